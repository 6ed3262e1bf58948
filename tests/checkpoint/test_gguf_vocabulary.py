import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from thrifty import ThriftyError
from thrifty.checkpoint import gguf_vocabulary as vocabulary
from thrifty.checkpoint.gguf import save_gguf
from thrifty.checkpoint.gguf_vocabulary import tokenizer_config, tokenizer_json, vocabulary_metadata
from thrifty.errors import ThriftyWarning
from thrifty.runtime.worker import Worker
from thrifty.train.tokenizer import train_tokenizer

PEERS = Path(__file__).parents[2] / "benchmarks" / "_peers.py"
PYTHON = os.environ.get("THRIFTY_PEER_PYTHON", sys.executable)
TEXTS = [
    "the with statement opens a file, and closes the file in the end: the other statements do not",
    "It's what they'd said, that WE'RE 1234567 years late; 3.14159, 22/7 and 100000",
    "def main():\n    for line in lines:\n        print(line)\n\n\treturn  None\r\n",
    "Äpfel über 東京の塔 и ещё немного текста, naïve café 🚀🚀 ça",
] * 3
NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\n \n\n \t\t \r\n  x",
    "hello",
    " hello  world   and    more ",
    "The statement's end, it'S HE'LL don't 'twas ''",
    "1 12 123 1234 12345.678 ½ ² ٣ Ⅳ 1a2b",
    "😀🚀🏳️‍🌈 👩‍👩‍👧",
    "Äpfel é é ǅ ß ſ İ ı 한국어 中文字 עברית العربية ไทย",
    "\u200b\u00a0\u3000\ufeff x\u0085y\u2028z",
    "a\x00b\x7f\x1b[0m",
    "▁ ▁▁a",
    "!!!...--- == (a[b]{c}) <tag/> $%^&*",
    "<|endoftext|>",
    "a<|endoftext|>b <|user|>\nHi<|assistant|> <|end",
    "<0x41> <s> </s><s> x</s>",
    "\ud7ff\ue000\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
    "    def f(x):\n\treturn x  # four\n\n\n",
    "e" + "́" * 5,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|user|>", "<|assistant|>"]


def byte_level(cut: str = LLAMA3, ignore_merges: bool = False, bos: bool = False, steps: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    first = steps or [pre_tokenizers.Split(Regex(cut), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=steps is not None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer


def sentencepiece(prefix: bool = True) -> Tokenizer:
    """BPE as converted from SentencePiece: every way to make a piece of two is a merge, in the order of the scores."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False)
    learner.train_from_iterator(TEXTS, trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda entry: entry[1])
    pieces = [text for text, _ in learned]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]
    vocab = {text: i for i, text in enumerate(texts)}
    merges = [
        (text[:i], text[i:])
        for text in texts[259:]
        for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in texts[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


#: A tokenizer of each kind, the fields of its tokenizer_config.json, and the words that llama.cpp has for it.
KINDS: dict[str, Any] = {
    "ours": (lambda: train_tokenizer(TEXTS, 400), {"eos_token": "<|endoftext|>"}, ("gpt2", "gpt-2")),
    "llama3": (
        lambda: byte_level(ignore_merges=True, bos=True),
        {"bos_token": "<|endoftext|>", "eos_token": "<|user|>"},
        ("gpt2", "llama-bpe"),
    ),
    "merges": (byte_level, {"eos_token": {"content": "<|user|>", "lstrip": False}}, ("gpt2", "dbrx")),
    "qwen2": (
        lambda: byte_level(LLAMA3.replace("{1,3}", "")),
        {"eos_token": "<|user|>", "pad_token": "<|endoftext|>"},
        ("gpt2", "qwen2"),
    ),
    "smollm": (
        lambda: byte_level(steps=[pre_tokenizers.Digits(individual_digits=True)]),
        {"eos_token": "<|endoftext|>"},
        ("gpt2", "smollm"),
    ),
    "llama2": (sentencepiece, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, ("llama", "default")),
    "gemma": (lambda: sentencepiece(False), {"bos_token": "<s>", "eos_token": "</s>"}, ("llama", "default")),
}


def made(kind: str, **fields: Any) -> tuple[Tokenizer, dict[str, Any]]:
    make, config, _ = KINDS[kind]
    tokenizer = make()
    rows = tokenizer.get_vocab_size() + 5
    return tokenizer, vocabulary_metadata(tokenizer.to_str(), config | fields, {}, None, rows)


def changed(kind: str, **parts: Any) -> str:
    """The tokenizer.json of a kind with some of its fields replaced."""
    return json.dumps(json.loads(KINDS[kind][0]().to_str()) | parts)


def export(text: str, **config: Any) -> dict[str, Any]:
    return vocabulary_metadata(text, {"eos_token": "<|user|>"}, config, None, 2000)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_comes_back_whole(kind):
    tokenizer, metadata = made(kind, model_max_length=77, chat_template="{{ messages }}")
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == KINDS[kind][2]
    assert tokenizer_json(metadata) == tokenizer.to_str()
    assert tokenizer_config(metadata) == KINDS[kind][1] | {"model_max_length": 77, "chat_template": "{{ messages }}"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_others_cuts_text_as_the_tokenizer_does(kind):
    tokenizer, metadata = made(kind)
    del metadata[vocabulary.TOKENIZER], metadata[vocabulary.TOKENIZER_CONFIG]
    text = tokenizer_json(metadata)
    assert text is not None
    again = Tokenizer.from_str(text)
    for sample in [*NASTY, *TEXTS]:
        ids = tokenizer.encode(sample).ids
        assert again.encode(sample).ids == ids, sample
        assert again.decode(ids) == tokenizer.decode(ids), sample
        assert again.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False)
    fields = tokenizer_config(metadata)
    for name, token in KINDS[kind][1].items():
        assert fields[name] == (token if isinstance(token, str) else token["content"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_as_many_as_the_embeddings_rows_and_differ(kind):
    tokenizer, metadata = made(kind)
    count = tokenizer.get_vocab_size() + 5
    texts, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (len(texts), len(set(texts)), kinds.shape, kinds.dtype) == (count, count, (count,), np.int32)
    assert [texts[i] for i in range(count - 5)] == [tokenizer.id_to_token(i) for i in range(count - 5)]
    assert kinds[-5:].tolist() == [vocabulary.UNUSED] * 5
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    marked = set(np.flatnonzero(np.isin(kinds, (vocabulary.CONTROL, vocabulary.UNKNOWN))).tolist())
    assert marked == special


def test_special_tokens_are_named_by_every_file_that_may_name_them():
    tokenizer = byte_level(bos=True)
    users = tokenizer.token_to_id("<|user|>")
    metadata = vocabulary_metadata(
        tokenizer.to_str(), {"eos_token": "<|user|>"}, {"eos_token_id": [users, 2], "pad_token_id": 2}, "x", 500
    )
    found = {key.split(".")[-1]: value for key, value in metadata.items() if key.endswith(("_id", "_token"))}
    assert found == {
        "bos_token_id": 0,
        "eos_token_id": users,
        "eot_token_id": 2,
        "padding_token_id": 2,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    assert all(type(value) is np.uint32 for key, value in found.items() if key.endswith("_id"))
    assert metadata["tokenizer.chat_template"] == "x"


def test_several_templates_keep_their_names():
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    _, metadata = made("ours", chat_template=named)
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert (metadata["tokenizer.chat_template"], metadata["tokenizer.chat_template.tool_use"]) == ("a", "b")
    assert tokenizer_config(metadata)["chat_template"] == named


def test_only_templates_that_are_texts_count():
    _, metadata = made("ours", chat_template=[{"name": "tool_use", "template": "b"}])
    assert tokenizer_config(metadata)["chat_template"] == [{"name": "tool_use", "template": "b"}]
    odd = metadata | {"tokenizer.chat_template": np.uint32(3)}
    assert tokenizer_config(odd)["chat_template"] == [{"name": "tool_use", "template": "b"}]
    assert "chat_template" not in tokenizer_config({"tokenizer.chat_template": np.uint32(3)})


def test_a_metaspace_is_written_with_a_warning():
    text = changed("llama2", normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": False})
    with pytest.warns(ThriftyWarning, match="space before each piece of text"):
        metadata = vocabulary_metadata(text, {"eos_token": "</s>"}, {}, None, 1000)
    assert metadata["tokenizer.ggml.add_space_prefix"] is True


A = {"Sequence": {"id": "A", "type_id": 0}}
REFUSED = {
    "unigram": (
        changed("ours", model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}, added_tokens=[]),
        "BPE; got Unigram",
    ),
    "regex": (byte_level(r"\p{L}+|\s|.").to_str(), "cuts by"),
    "ignored merges": (byte_level(LLAMA3.replace("{1,3}", ""), ignore_merges=True).to_str(), "takes words"),
    "normalizer": (changed("ours", normalizer={"type": "Lowercase"}), "normalizes by Lowercase"),
    "no cut": (changed("ours", pre_tokenizer=None), "byte-level; got no cut"),
    "prefix": (
        changed("ours", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        "add_prefix_space",
    ),
    "around": (
        changed("ours", post_processor={"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}),
        "template; got BertProcessing",
    ),
    "two before": (
        changed(
            "ours",
            post_processor={
                "type": "TemplateProcessing",
                "single": [*[{"SpecialToken": {"id": name, "type_id": 0}} for name in SPECIALS[:2]], A],
                "pair": [A, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in enumerate(SPECIALS)},
            },
        ),
        r"before a text is the bos token; got \['<.endoftext.>', '<.user.>'\]",
    ),
    "no JSON": ("{", "must be read by tokenizers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_word_for_is_refused(case):
    text, reason = REFUSED[case]
    with pytest.raises(ThriftyError, match=rf"^\[gguf\] .*{reason}"):
        export(text)


@pytest.mark.parametrize("kind", ["ours", "llama2"])
@pytest.mark.parametrize(
    "trait", [{"dropout": 0.1}, {"end_of_word_suffix": "</w>"}, {"continuing_subword_prefix": "##"}], ids=str
)
def test_a_bpe_that_llama_cpp_does_not_have_is_refused(kind, trait):
    fields = json.loads(KINDS[kind][0]().to_str())
    # Without merges, which tokenizers looks for under other names then.
    fields["model"] |= trait | {"merges": []}
    with pytest.raises(ThriftyError, match=rf"a BPE has no {next(iter(trait))}; got"):
        export(json.dumps(fields))


def test_pieces_that_ignore_merges_are_refused():
    fields = json.loads(sentencepiece().to_str())
    fields["model"]["ignore_merges"] = True
    with pytest.raises(ThriftyError, match=r"come of merges alone; .* as they are"):
        export(json.dumps(fields))


def test_pieces_that_no_merge_makes_are_refused():
    fields = json.loads(sentencepiece().to_str())
    del fields["model"]["merges"][0]
    with pytest.raises(ThriftyError, match="no merge makes"):
        export(json.dumps(fields))


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ThriftyError, match="must name the token that ends a text"):
        vocabulary_metadata(byte_level().to_str(), {}, {}, None, 500)
    assert vocabulary_metadata(byte_level().to_str(), {}, {"eos_token_id": 1}, None, 500)


def test_a_token_beyond_the_embedding_is_refused():
    tokenizer = byte_level()
    with pytest.raises(ThriftyError, match="below the embedding's 300 rows"):
        vocabulary_metadata(tokenizer.to_str(), {"eos_token": "<|user|>"}, {}, None, 300)


def test_stripping_tokens_are_refused():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(ThriftyError, match="'<mask>' has lstrip"):
        export(tokenizer.to_str())


UNREAD = {
    "kind": ({"tokenizer.ggml.model": "bert"}, "gpt2 and llama; got bert"),
    "pre": ({"tokenizer.ggml.pre": "viking"}, "got viking"),
    "no pre": ({"tokenizer.ggml.pre": None}, "got none"),
    "tokens": ({"tokenizer.ggml.tokens": []}, "list of texts; got NoneType in it"),
    "no tokens": ({"tokenizer.ggml.tokens": np.arange(3)}, "is a list; got ndarray"),
    "types": ({"tokenizer.ggml.token_type": np.ones(3, np.int32)}, "a number for each"),
    "merges": ({"tokenizer.ggml.merges": ["ab"]}, "list of pairs"),
    "no merges": ({"tokenizer.ggml.merges": None}, "list of pairs of pieces; got none"),
    "flag": ({"tokenizer.ggml.add_bos_token": "yes"}, "is a bool; got str"),
    "special": ({"tokenizer.ggml.bos_token_id": np.uint32(10**6)}, "one of"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_here_is_refused(case):
    _, metadata = made("ours")
    del metadata[vocabulary.TOKENIZER]
    change, reason = UNREAD[case]
    with pytest.raises(vocabulary.UnreadVocabularyError, match=rf"^\[gguf\] .*{reason}.*; pass token ids"):
        tokenizer_json({key: value for key, value in (metadata | change).items() if value is not None})


def test_any_metadata_give_a_tokenizer_or_an_error():
    odd = [np.uint32(0), np.uint64(2**63), np.int32(-1), np.float32("nan"), True, "", "x", "{}", [], ["a"], ["a b", ""]]
    odd += [np.zeros(3, np.uint8), np.full(405, np.nan), (np.zeros(2, np.int8),)]
    rng, outcomes = np.random.default_rng(0), set()
    for kind in ("ours", "llama2"):
        _, whole = made(kind, chat_template="x")
        del whole[vocabulary.TOKENIZER]
        keys = [
            *whole,
            "tokenizer.chat_templates",
            "tokenizer.ggml.unknown_token_id",
            "tokenizer.ggml.add_space_prefix",
        ]
        for key in keys * 10:
            metadata = whole | {key: odd[rng.integers(len(odd))]}
            bare = {k: v for k, v in metadata.items() if k != vocabulary.TOKENIZER_CONFIG}
            for read, given in ((tokenizer_json, metadata), (tokenizer_config, metadata), (tokenizer_config, bare)):
                try:
                    read(given)
                    outcomes.add("read")
                except ThriftyError:
                    outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_pieces_without_scores_are_refused():
    _, metadata = made("llama2")
    del metadata[vocabulary.TOKENIZER], metadata["tokenizer.ggml.scores"]
    with pytest.raises(ThriftyError, match=r"'tokenizer\.ggml\.scores' has a number for each"):
        tokenizer_json(metadata)


def test_pieces_have_the_special_tokens_that_llama_cpp_takes_for_unnamed_ones():
    tokenizer, metadata = made("llama2")
    for key in list(metadata):
        if key in (vocabulary.TOKENIZER, vocabulary.TOKENIZER_CONFIG) or key.endswith("_token_id"):
            del metadata[key]
    text = tokenizer_json(metadata)
    assert text is not None
    assert Tokenizer.from_str(text).encode("hello").ids == tokenizer.encode("hello").ids
    fields = tokenizer_config(metadata)
    assert [fields[name] for name in ("bos_token", "eos_token", "unk_token")] == ["<s>", "</s>", "<unk>"]
    assert "pad_token" not in fields
    metadata["tokenizer.ggml.add_eos_token"] = True
    assert Tokenizer.from_str(tokenizer_json(metadata) or "").encode("hello").ids[-1] == 2
    # Byte-level vocabularies have no such defaults here.
    assert "bos_token" not in tokenizer_config({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]})


def test_a_file_without_a_vocabulary_has_no_tokenizer():
    assert tokenizer_json({"tokenizer.ggml.model": "no_vocab"}) is None
    assert tokenizer_json({}) is None
    assert "chat_template" not in tokenizer_config({})


def test_the_vocabulary_of_llama_3_needs_no_name():
    _, metadata = made("llama3")
    del metadata[vocabulary.TOKENIZER], metadata["tokenizer.ggml.pre"]
    texts = metadata["tokenizer.ggml.tokens"]
    filler = [f"[PAD{i}]" for i in range(len(texts), 128_000)]
    metadata["tokenizer.ggml.tokens"] = [*texts, *filler, "<|begin_of_text|>"]
    kinds = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = np.concatenate([kinds, np.full(len(filler) + 1, vocabulary.UNUSED)])
    text = tokenizer_json(metadata)
    assert text is not None
    assert [Tokenizer.from_str(text).encode(t).ids for t in NASTY] == [made("llama3")[0].encode(t).ids for t in NASTY]


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path, kind):
    tokenizer, metadata = made(kind)
    path = tmp_path / "vocabulary.gguf"
    save_gguf(path, {"general.architecture": "llama", **metadata}, [])
    samples = [*NASTY, *TEXTS]
    with Worker("llama", (PYTHON, str(PEERS), "llama"), {}) as llama:
        found = llama("tokenize", path=str(path), texts=samples)
    assert found == [tokenizer.encode(sample).ids for sample in samples]
