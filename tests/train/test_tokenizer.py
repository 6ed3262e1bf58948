import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from thrifty.errors import ThriftyError
from thrifty.train.tokenizer import END, SMALLEST, check_pieces, open_tokenizer, save_tokenizer, train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\n    def f(x): return x\n" * 20
TOKENIZERS = {size: train_tokenizer([TEXT], size) for size in (SMALLEST, 300)}


@pytest.mark.parametrize("size", TOKENIZERS)
@given(st.text() | st.binary().map(lambda b: b.decode("utf-8", "replace")))
def test_any_text_survives(size, text):
    tokenizer = TOKENIZERS[size]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_smallest_vocabulary_is_plain_bytes():
    assert TOKENIZERS[SMALLEST].get_vocab_size() == SMALLEST
    assert len(TOKENIZERS[SMALLEST].encode("naïve").ids) == len("naïve".encode())


def test_merges_shorten_the_text():
    assert TOKENIZERS[300].get_vocab_size() == 300
    assert len(TOKENIZERS[300].encode(TEXT).ids) < len(TEXT) / 2


def test_a_smaller_vocabulary_is_refused():
    with pytest.raises(ThriftyError, match=r"at least 260 pieces .* got 259"):
        train_tokenizer([TEXT], SMALLEST - 1)


def test_tokenizers_and_transformers_read_it(tmp_path):
    save_tokenizer(TOKENIZERS[300], tmp_path, 128)
    ids = TOKENIZERS[300].encode(TEXT).ids
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.eos_token == END
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 128


def test_the_chat_template_ends_where_the_answer_begins(tmp_path):
    save_tokenizer(TOKENIZERS[300], tmp_path, 128)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    prompt = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>\nHi\n<|assistant|>\nHello<|endoftext|>\n<|user|>\nBye\n<|assistant|>\n"


def saved(folder, texts=("some text",), **config):
    folder.mkdir()
    tokenizer = train_tokenizer(texts, SMALLEST + 4)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def test_a_tokenizer_is_given_by_its_folder_or_file(tmp_path):
    tokenizer = saved(tmp_path / "a", eos_token={"content": "<|user|>"})
    for place in (tmp_path / "a", tmp_path / "a" / "tokenizer.json", str(tmp_path / "a")):
        read, folder, end = open_tokenizer(place)
        assert read.get_vocab() == tokenizer.get_vocab()
        assert folder == tmp_path / "a"
        assert end == tokenizer.token_to_id("<|user|>")
    saved(tmp_path / "b")
    assert open_tokenizer(tmp_path / "b")[2] == tokenizer.token_to_id(END)


def test_tokenizers_that_do_not_serve_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("no-such", "./no/such"):
        with pytest.raises(ThriftyError, match=r"bpe, bytes, a folder, a tokenizer.json or a hub id; got .*no.such"):
            open_tokenizer(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ThriftyError, match=r"must be a tokenizer.json; .*empty has none"):
        open_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(ThriftyError, match=r"tokenizer.json must be a tokenizer; .*get it again"):
        open_tokenizer(tmp_path / "empty")
    Tokenizer(models.BPE()).save(str(tmp_path / "empty" / "tokenizer.json"))
    with pytest.raises(ThriftyError, match=r"must have a token that ends a text; .* has none; name it as eos_token"):
        open_tokenizer(tmp_path / "empty")
    tokenizer = saved(tmp_path / "a")
    check_pieces(tokenizer, "a", tokenizer.get_vocab_size())
    with pytest.raises(ThriftyError, match=r"ids must be below the model's 260 pieces; a has ids up to 26\d"):
        check_pieces(tokenizer, "a", 260)
