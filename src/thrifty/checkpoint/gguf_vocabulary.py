"""A tokenizer.json as the vocabulary of a GGUF file, in the words that llama.cpp knows, and the way back.

llama.cpp keeps no rules of a tokenizer, only its kind and the name of one of its own pre-tokenizers. What it would cut
otherwise is refused here, never guessed. Checked against llama.cpp 0.5.0 (that of llama-cpp-python 0.3.36).
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from thrifty.errors import ThriftyError, ThriftyWarning

#: The whole tokenizer.json, a key of the GGUF standard; and what else transformers reads beside it.
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.huggingface.json", "thrifty.tokenizer_config"
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
_KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: GGUF's names of special tokens, and transformers'.
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
#: llama.cpp's ids of those that a vocabulary of pieces does not name.
_DEFAULTS = {"unknown": 0, "bos": 1, "eos": 2}
#: What stands for a space where pieces are those of SentencePiece.
SPACE = "▁"

_BYTES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_LINES = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _LINES
_QWEN2 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _LINES
_QWEN35 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + _LINES


@dataclass(frozen=True)
class _Cut:
    """How llama.cpp cuts a text into words, and what else it takes from the name of a pre-tokenizer."""

    #: Each cuts what the one before it left.
    regexes: tuple[str, ...]
    #: Whether a word that is a token is taken as it is, whatever the merges.
    ignore_merges: bool = False
    add_bos: bool = False


#: By the names of `tokenizer.ggml.pre`; of those alike the first is written.
_CUTS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4"), _Cut((_BYTES,))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), _Cut((_LLAMA3,), True, True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Cut((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _Cut((_QWEN2,))),
    "qwen35": _Cut((_QWEN35,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _Cut((r"\p{N}", _BYTES))),
}


class UnreadVocabularyError(ThriftyError):
    """A file's vocabulary is of a kind that is not read here; its model takes and gives token ids."""


def vocabulary_metadata(
    tokenizer_json: str,
    tokenizer_config: dict[str, Any],
    config: dict[str, Any],
    chat_template: str | None,
    vocab_size: int,
) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a GGUF file, from the files of a Hugging Face checkpoint.

    tokenizer_config, config: contents of tokenizer_config.json and config.json, empty where absent. chat_template: text
    of the template where it has a file of its own; otherwise that of tokenizer_config counts. vocab_size: rows of the
    embedding; tokens that the tokenizer lacks are filled up. An NFC normalizer is dropped, as llama.cpp has none.
    Raises ThriftyError for a tokenizer that llama.cpp has no word for.
    """
    try:
        # It fills in what a file may leave out.
        tokenizer = json.loads(Tokenizer.from_str(tokenizer_json).to_str())
    except Exception as error:  # tokenizers raises bare Exception
        raise ThriftyError(f"[gguf] tokenizer.json must be read by tokenizers; {error}; save it again") from error
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    for token in added:
        traits = [trait for trait in ("lstrip", "rstrip", "single_word") if token[trait]]
        if traits:
            raise _refused(f"tokens are found as they stand; '{token['content']}' has {traits[0]}")
    if model["type"] != "BPE":
        raise _refused(f"vocabularies are BPE; got {model['type']}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model[name]:
            raise _refused(f"a BPE has no {name}; got {model[name]!r}")
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    last = max(ids.values(), default=-1)
    if last >= vocab_size:
        raise _refused(f"token ids are below the embedding's {vocab_size} rows; got {last}")
    kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    texts, kind_array = _token_arrays(ids, kinds, vocab_size)
    metadata: dict[str, Any] = {f"{_KEY}tokens": texts, f"{_KEY}token_type": kind_array}
    metadata = _sentencepiece(tokenizer, ids, metadata) if model["byte_fallback"] else _byte_level(tokenizer, metadata)
    metadata |= _special_tokens(tokenizer, ids, tokenizer_config, config)
    metadata[TOKENIZER] = tokenizer_json
    kept = {name: value for name, value in tokenizer_config.items() if name != "chat_template"}
    metadata[TOKENIZER_CONFIG] = json.dumps(kept, ensure_ascii=False)
    return metadata | _templates(tokenizer_config.get("chat_template") if chat_template is None else chat_template)


def tokenizer_json(metadata: dict[str, Any]) -> str | None:
    """The tokenizer.json of a GGUF file: the one it holds, or one built from its tokens and merges or scores.

    None where the file has no vocabulary. Raises UnreadVocabularyError where its kind is not read here.
    """
    if isinstance(metadata.get(TOKENIZER), str):
        return metadata[TOKENIZER]
    _check_types(metadata)
    kind = metadata.get(f"{_KEY}model")
    if kind in (None, "no_vocab", "none"):
        return None
    if kind not in ("gpt2", "llama"):
        raise _unread(f"vocabularies read here are gpt2 and llama; got {kind}")
    texts, kinds = _tokens(metadata)
    byte_level = kind == "gpt2"
    cut = _cut_of(metadata, texts) if byte_level else _Cut((), add_bos=True)
    vocab = {text: i for i, text in enumerate(texts) if kinds[i] != UNUSED}
    unknown = None if byte_level else texts[_special_id(metadata, "unknown")]
    rules = _byte_level_rules(metadata, cut) if byte_level else _sentencepiece_rules(metadata, texts, kinds)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": not byte_level,
        "byte_fallback": bool((kinds == BYTE).any()),
        "ignore_merges": cut.ignore_merges,
        "vocab": vocab,
        "merges": rules.pop("merges"),
    }
    special = (CONTROL, UNKNOWN)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": texts[i], **flags, "special": int(kinds[i]) in special}
        for i in np.flatnonzero(np.isin(kinds, (*special, USER_DEFINED))).tolist()
    ]
    frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    processor = _post_processor(metadata, texts, cut.add_bos)
    return json.dumps({**frame, **rules, "post_processor": processor, "model": model}, ensure_ascii=False)


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json should hold: special tokens, and the chat template or templates."""
    stored = metadata.get(TOKENIZER_CONFIG)
    if isinstance(stored, str):
        fields = _parsed(stored)
    else:
        texts = metadata.get(f"{_KEY}tokens")
        texts = texts if isinstance(texts, list) else []
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, field in SPECIAL.items():
            token = _special_id(metadata, name)
            if isinstance(token, int | np.integer) and 0 <= token < len(texts):
                fields[field] = texts[int(token)]
    listed = metadata.get(TEMPLATES)
    listed = listed if isinstance(listed, list) else []
    names = [name for name in listed if isinstance(metadata.get(f"{TEMPLATE}.{name}"), str)]
    if names:
        named = [{"name": name, "template": metadata[f"{TEMPLATE}.{name}"]} for name in names]
        default = metadata.get(TEMPLATE)
        first = [{"name": "default", "template": default}] if isinstance(default, str) else []
        fields["chat_template"] = [*first, *named]
    elif isinstance(metadata.get(TEMPLATE), str):
        fields["chat_template"] = metadata[TEMPLATE]
    return fields


def _token_arrays(ids: dict[str, int], kinds: dict[int, int], count: int) -> tuple[list[str], np.ndarray]:
    """Text and kind of every token; names of tokens that are none must differ from all others."""
    texts: list[str | None] = [None] * count
    for text, i in ids.items():
        texts[i] = text
    array = np.full(count, NORMAL, np.int32)
    for i, text in enumerate(texts):
        if text is None:
            name = f"[PAD{i}]"
            while name in ids:
                name += "_"
            texts[i], array[i] = name, UNUSED
        elif i in kinds:
            array[i] = kinds[i]
    return texts, array  # type: ignore[return-value]


def _byte_level(tokenizer: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Adds what byte-level BPE has."""
    model = tokenizer["model"]
    normalizer = tokenizer["normalizer"]
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _refused(f"text is taken as it stands; the tokenizer normalizes by {normalizer.get('type')}")
    regexes = tuple(_regexes(tokenizer["pre_tokenizer"]))
    ignores = model["ignore_merges"]
    name = next((n for n, cut in _CUTS.items() if (cut.regexes, cut.ignore_merges) == (regexes, ignores)), None)
    if name is None:
        taken = " that takes words which are tokens as they are" if ignores else ""
        raise _refused(f"words are cut by one of {', '.join(_written())}; the tokenizer{taken} cuts by {regexes}")
    merges = [" ".join(merge) for merge in model["merges"]]
    return {f"{_KEY}model": "gpt2", f"{_KEY}pre": name, **metadata, f"{_KEY}merges": merges}


def _written() -> list[str]:
    """A name for each way to cut."""
    return list({cut: name for name, cut in reversed(_CUTS.items())}.values())[::-1]


def _regexes(rule: dict[str, Any] | None) -> Iterator[str]:
    """The regexes of a pre-tokenizer that ends with the step from bytes to characters."""
    steps = _steps(rule, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise _refused(f"a BPE without byte fallback is byte-level; got {[step['type'] for step in steps] or 'no cut'}")
    for step in steps[:-1]:
        pattern = (step.get("pattern") or {}).get("Regex")
        if step["type"] == "Digits" and step["individual_digits"]:
            yield r"\p{N}"
        elif pattern and (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True)):
            yield pattern
        else:
            raise _refused(f"words are cut by regexes; got {step}")
    if steps[-1]["add_prefix_space"]:
        raise _refused("byte-level text gets no space before it; got add_prefix_space")
    if steps[-1]["use_regex"]:
        yield _BYTES


def _sentencepiece(tokenizer: dict[str, Any], ids: dict[str, int], metadata: dict[str, Any]) -> dict[str, Any]:
    """Adds what BPE in the manner of SentencePiece has: scores that order the tokens by when they are merged."""
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    if model["ignore_merges"]:
        raise _refused(
            "pieces with byte fallback come of merges alone; the tokenizer takes words which are tokens as they are"
        )
    prefix = _space_prefix(tokenizer)
    loose = next((token["content"] for token in added if token["normalized"]), None)
    if loose is not None:
        raise _refused(f"special tokens are found before spaces are marked; '{loose}' is normalized")
    pairs = [(left, right) for left, right in model["merges"]]
    first: dict[str, int] = {}
    for left, right in pairs:
        first.setdefault(left + right, len(first))
    special = {token["content"] for token in added}
    allowed = set(pairs)
    for text in model["vocab"].keys() - special:
        for pair in _halves(text, model["vocab"]):
            if pair not in allowed and not _is_byte(text):
                raise _refused(
                    f"two pieces whose join is a token are merged; no merge makes '{text}' of '{pair[0]}', '{pair[1]}'"
                )
    for text in first.keys() & special:
        raise _refused(f"special tokens are made by no merge; '{text}' is")
    scores, kinds = np.empty(len(metadata[f"{_KEY}tokens"]), np.float32), metadata[f"{_KEY}token_type"]
    # What no merge makes comes after all that one does.
    for i, text in enumerate(metadata[f"{_KEY}tokens"]):
        scores[i] = -first.get(text, len(first) + i)
        if kinds[i] == NORMAL and _is_byte(text):
            kinds[i] = BYTE
    missing = next((byte for byte in map(_byte_name, range(256)) if byte not in ids), None)
    if missing is not None:
        raise _refused(f"pieces with byte fallback have all 256 bytes; '{missing}' is missing")
    if model["unk_token"] in ids:
        kinds[ids[model["unk_token"]]] = UNKNOWN
    head = {f"{_KEY}model": "llama", f"{_KEY}pre": "default", f"{_KEY}add_space_prefix": prefix}
    return head | metadata | {f"{_KEY}scores": scores}


def _space_prefix(tokenizer: dict[str, Any]) -> bool:
    """Whether a space goes before a text, where rules do nothing else than that and mark spaces."""
    normalizer, rule = _steps(tokenizer["normalizer"], "normalizers"), tokenizer["pre_tokenizer"]
    prepend, replace = {"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "content": SPACE}
    plain = [{k: v for k, v in step.items() if k != "pattern"} for step in normalizer]
    spaces = all(step["pattern"] == {"String": " "} for step in normalizer if "pattern" in step)
    if rule is None and spaces and plain in ([prepend, replace], [replace]):
        return len(plain) == 2
    if rule is None or (rule["type"], rule.get("replacement"), normalizer) != ("Metaspace", SPACE, []):
        got = [step["type"] for step in normalizer] + ([] if rule is None else [rule["type"]])
        raise _refused(f"pieces with byte fallback mark spaces by '{SPACE}' and do no more; got {got or 'no rule'}")
    joined = next((text for text in tokenizer["model"]["vocab"] if SPACE in text[1:]), None)
    if rule["split"] and joined is not None:
        raise _refused(f"pieces are not cut before they are merged; the tokenizer cuts at spaces and has '{joined}'")
    scheme = rule["prepend_scheme"]
    if scheme != "never":
        warnings.warn(
            "[gguf] llama.cpp puts a space before each piece of text between special tokens; the tokenizer's scheme "
            f"is '{scheme}', so texts that begin with a space, or follow a special token, may get other tokens there",
            ThriftyWarning,
            stacklevel=4,
        )
    return scheme != "never"


def _special_tokens(
    tokenizer: dict[str, Any], ids: dict[str, int], fields: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """Ids of special tokens, and which of them go around a text."""
    found: dict[str, int] = {}
    for name, field in SPECIAL.items():
        text = fields.get(field)
        text = text.get("content") if isinstance(text, dict) else text
        given = [ids[text]] if text in ids else _ids(config.get(f"{field}_id"))
        found |= {name: given[0]} if given else {}
    before, after = _around(tokenizer["post_processor"])
    for name, added in (("bos", before), ("eos", after)):
        if len(added) > 1 or (added and name in found and ids.get(added[0]) != found[name]):
            raise _refused(
                f"what goes {'before' if name == 'bos' else 'after'} a text is the {name} token; got {added}"
            )
        found |= {name: ids[added[0]]} if added and added[0] in ids else {}
    if "eos" not in found:
        # Its default is token 11, which would end every text.
        raise _refused("a tokenizer must name the token that ends a text; got none; set eos_token")
    found.setdefault("bos", found["eos"])
    metadata: dict[str, Any] = {f"{_KEY}{name}_token_id": np.uint32(i) for name, i in found.items()}
    others = [i for i in _ids(config.get("eos_token_id")) if i != found["eos"]]
    metadata |= {f"{_KEY}{name}_token_id": np.uint32(i) for name, i in zip(("eot", "eom"), others, strict=False)}
    return metadata | {f"{_KEY}add_bos_token": bool(before), f"{_KEY}add_eos_token": bool(after)}


def _ids(value: Any) -> list[int]:
    """Token ids of a field of config.json: none, one or several."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]


def _around(rule: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """Special tokens before and after a text."""
    before: list[str] = []
    after: list[str] = []
    for step in _steps(rule, "processors"):
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise _refused(f"special tokens go around a text by a template; got {step['type']}")
        side = before
        for part in step["single"]:
            if "Sequence" in part:
                side = after
            else:
                side.append(part["SpecialToken"]["id"])
    return before, after


def _templates(template: Any) -> dict[str, Any]:
    """A chat template, or several with names."""
    if isinstance(template, str):
        return {TEMPLATE: template}
    entries = [entry for entry in template or [] if isinstance(entry, dict)]
    named = {str(entry.get("name")): str(entry.get("template")) for entry in entries}
    others = {f"{TEMPLATE}.{name}": text for name, text in named.items() if name != "default"}
    default = {TEMPLATE: named["default"]} if "default" in named else {}
    return default | others | ({TEMPLATES: [name for name in named if name != "default"]} if others else {})


def _check_types(metadata: dict[str, Any]) -> None:
    """Raises UnreadVocabularyError where a value that is read has another type."""
    types: dict[str, Any] = {
        **dict.fromkeys(("model", "pre"), str),
        **dict.fromkeys(("tokens", "merges"), list),
        **dict.fromkeys(("token_type", "scores"), np.ndarray),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), bool),
        **{f"{name}_token_id": np.integer for name in SPECIAL},
    }
    for name, kind in types.items():
        value = metadata.get(_KEY + name)
        if value is not None and not isinstance(value, kind):
            raise _unread(f"'{_KEY}{name}' is a {kind.__name__}; got {type(value).__name__}")


def _tokens(metadata: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Texts and kinds of the tokens of a file."""
    texts = metadata.get(f"{_KEY}tokens") or []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _unread(f"'{_KEY}tokens' is a list of texts; got {type(next(iter(texts), None)).__name__} in it")
    kinds = metadata.get(f"{_KEY}token_type", np.full(len(texts), NORMAL))
    if kinds.shape != (len(texts),):
        raise _unread(f"'{_KEY}token_type' has a number for each of {len(texts)} tokens; got {kinds.size}")
    for name in SPECIAL:
        token = _special_id(metadata, name)
        if token is not None and not 0 <= token < len(texts):
            raise _unread(f"'{_KEY}{name}_token_id' is one of {len(texts)} tokens; got {token}")
    return texts, kinds


def _special_id(metadata: dict[str, Any], name: str) -> Any:
    """The id of a special token, as it stands there or by default; None where there is neither."""
    kind = metadata.get(f"{_KEY}model")
    pieces = isinstance(kind, str) and kind == "llama"
    return metadata.get(f"{_KEY}{name}_token_id", _DEFAULTS.get(name) if pieces else None)


def _cut_of(metadata: dict[str, Any], texts: list[str]) -> _Cut:
    """The pre-tokenizer of a byte-level vocabulary."""
    name = metadata.get(f"{_KEY}pre")
    if name in _CUTS:
        return _CUTS[name]
    # Files of converters that know no names have none; this vocabulary is Llama 3's, which has one way to cut.
    if name in (None, "default") and texts[128_000:128_001] == ["<|begin_of_text|>"]:
        return _CUTS["llama-bpe"]
    raise _unread(f"pre-tokenizers read here are {', '.join(_CUTS)}; got {name or 'none'}")


def _byte_level_rules(metadata: dict[str, Any], cut: _Cut) -> dict[str, Any]:
    """Merges and rules of a byte-level vocabulary."""
    merges = metadata.get(f"{_KEY}merges")
    if merges is None or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise _unread(f"'{_KEY}merges' is a list of pairs of pieces; got {'none' if merges is None else 'other texts'}")
    pairs = [(merge[: (at := merge.index(" ", 1))], merge[at + 1 :]) for merge in merges]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cuts = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in cut.regexes
    ]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, step]},
        "decoder": step,
        "merges": pairs,
    }


def _sentencepiece_rules(metadata: dict[str, Any], texts: list[str], kinds: np.ndarray) -> dict[str, Any]:
    """Merges and rules of pieces with scores: any two pieces are merged whose join is one, the best score first."""
    scores = metadata.get(f"{_KEY}scores", np.empty(0))
    if scores.shape != (len(texts),) or not np.isfinite(scores).all():
        raise _unread(f"'{_KEY}scores' has a number for each of {len(texts)} tokens; got {scores.size}")
    vocab = {text: i for i, text in enumerate(texts) if kinds[i] != UNUSED}
    merged = [i for i in np.argsort(-scores, kind="stable").tolist() if kinds[i] == NORMAL]
    pairs = [pair for i in merged for pair in _halves(texts[i], vocab)]
    prefix = metadata.get(f"{_KEY}add_space_prefix", True)
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    begin = {"type": "Prepend", "prepend": SPACE}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [begin, mark] if prefix else [mark]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "merges": pairs,
    }


def _post_processor(metadata: dict[str, Any], texts: list[str], add_bos: bool) -> dict[str, Any] | None:
    """The template that puts special tokens around a text."""
    around: dict[str, list[dict[str, Any]]] = {"bos": [], "eos": []}
    named: dict[str, dict[str, Any]] = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        token = _special_id(metadata, name)
        if token is not None and metadata.get(f"{_KEY}add_{name}_token", default):
            text = texts[int(token)]
            around[name] = [{"SpecialToken": {"id": text, "type_id": 0}}]
            named[text] = {"id": text, "ids": [int(token)], "tokens": [text]}
    if not named:
        return None
    single = [*around["bos"], {"Sequence": {"id": "A", "type_id": 0}}, *around["eos"]]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def _halves(text: str, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every two pieces of a vocabulary that join to a text."""
    return ((text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab)


def _byte_name(byte: int) -> str:
    return f"<0x{byte:02X}>"


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _steps(rule: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """A rule of tokenizer.json as the list of its steps."""
    if rule is None:
        return []
    return [step for part in rule[parts] for step in _steps(part, parts)] if rule["type"] == "Sequence" else [rule]


def _parsed(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ThriftyError(f"[gguf] a tokenizer must be JSON; {error}; save it again") from error
    if not isinstance(fields, dict):
        raise ThriftyError(f"[gguf] a tokenizer must be a JSON object; got {type(fields).__name__}; save it again")
    return fields


def _refused(rule: str) -> ThriftyError:
    return ThriftyError(f"[gguf] in llama.cpp {rule}; keep the model in safetensors")


def _unread(rule: str) -> UnreadVocabularyError:
    return UnreadVocabularyError(f"[gguf] {rule}; pass token ids, or take tokenizer.json from the model's first home")
