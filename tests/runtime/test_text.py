import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import byte_tokenizer, write_checkpoint

from thrifty import ThriftyError
from thrifty.checkpoint import TensorToWrite, open_folder, open_gguf, save_gguf
from thrifty.checkpoint.chat_format import CHAT_TEMPLATE
from thrifty.convert import to_gguf
from thrifty.runtime import load
from thrifty.runtime.chat_template import render_chat
from thrifty.runtime.inference import byte_tokenizer as seed_tokenizer
from thrifty.runtime.text import pieces, until_stop

TOKENIZER = byte_tokenizer()


@given(st.text())
def test_pieces_are_whole_characters_and_lose_nothing(text):
    given = list(pieces(TOKENIZER, TOKENIZER.encode(text).ids))
    assert "".join(given) == text
    assert all(piece and "\ufffd" not in piece for piece in given) or "\ufffd" in text


@given(st.lists(st.integers(0, 256)))
def test_pieces_of_any_tokens_are_what_decoding_gives(tokens):
    assert "".join(pieces(TOKENIZER, tokens)) == TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_a_cut_character_is_given_at_the_end():
    tokens = TOKENIZER.encode("aé").ids
    assert list(pieces(TOKENIZER, tokens[:-1])) == ["a", "\ufffd"]


@given(st.lists(st.text("ab.", max_size=4)), st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3))
def test_until_stop_cuts_the_joined_text(parts, stops):
    text = "".join(parts)
    # The end of a stop decides, whatever pieces it comes in; of two with one end, the longer is left out.
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    given = list(until_stop(parts, stops))
    assert "".join(given) == text[: min(found, default=(0, len(text)))[1]]
    assert all(given)


def test_text_is_not_held_back_longer_than_needed():
    seen = until_stop(iter(["one", " E", "x", "END", "more"]), ["END"])
    assert next(seen) == "one"
    assert next(seen) == " "
    assert "".join(seen) == "Ex"


@pytest.mark.parametrize("text", ["plain", "æøå €", "\x00\x7f", "日本"])
def test_the_seeds_tokens_are_bytes(text):
    tokenizer = seed_tokenizer()
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "model", vocab_size=256).path
    with pytest.raises(ThriftyError, match=r"vocabulary of 256; .*tokenizer\.json has id 256"):
        load(path)


def test_a_malformed_tokenizer_is_named(tmp_path):
    path = write_checkpoint(tmp_path / "model", tokenizer=False).path
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ThriftyError, match=r"tokenizer\.json cannot be read"):
        load(path)


def test_without_a_tokenizer_ids_still_work(tmp_path):
    runtime = load(write_checkpoint(tmp_path / "model", tokenizer=False).path)
    assert len(runtime.generate_tokens([1, 2], max_new_tokens=3, ignore_eos=True)) == 3
    with pytest.raises(ThriftyError, match=r"has no tokenizer\.json"):
        runtime.generate("text")


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"


def test_chat_prompt_by_template_and_plain(tmp_path):
    path = write_checkpoint(tmp_path / "model").path
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    tokens, stops = load(path).chat_prompt(messages)
    assert load(path).decode(tokens) == "System: S\n\nUser: hi\n\nAssistant:"
    assert "\nUser:" in stops
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": {"content": "<|end|>", "special": True}})
    )
    tokens, stops = load(path).chat_prompt(messages)
    assert tokens.count(256) == 2
    assert stops == []
    assert load(path).decode(tokens) == "<system>S<user>hi<assistant>"


def test_a_template_file_goes_first_and_may_refuse(tmp_path):
    path = write_checkpoint(tmp_path / "model").path
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (path / "chat_template.jinja").write_text("{{ raise_exception('no system messages') }}")
    with pytest.raises(ThriftyError, match="no system messages"):
        load(path).chat_prompt([{"role": "user", "content": "hi"}])


def test_a_template_without_jinja_says_what_to_install(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "model").path
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ThriftyError, match=r"pip install 'thrifty\[chat\]'"):
        load(path).chat_prompt([{"role": "user", "content": "hi"}])


MESSAGES = [{"role": r, "content": c} for r, c in [("user", " a "), ("assistant", "b <é>"), ("user", "c")]]


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[:1], [{"role": "system", "content": "S"}, *MESSAGES]])
def test_our_own_template_needs_no_jinja(tmp_path, monkeypatch, messages):
    by_jinja = render_chat(messages, CHAT_TEMPLATE + "{# not ours #}", {})
    path = write_checkpoint(tmp_path / "model").path
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    runtime = load(path)
    assert runtime.chat_prompt(messages) == (runtime.encode(by_jinja), [])


def test_of_several_templates_the_default_is_taken(tmp_path):
    path = write_checkpoint(tmp_path / "model").path
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    runtime = load(path)
    assert runtime.decode(runtime.chat_prompt(MESSAGES)[0]) == "yes"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(ThriftyError, match="named 'default'; got tool_use"):
        load(path).chat_prompt(MESSAGES)


def test_a_template_has_the_date_and_json(tmp_path):
    text = render_chat(MESSAGES, "{{ strftime_now('%Y') }} {{ messages[1] | tojson }}", {})
    year, _, record = text.partition(" ")
    assert 2024 < int(year) < 3000
    assert record == '{"role": "assistant", "content": "b <é>"}'


@pytest.mark.parametrize("template", ["{{ 1/0 }}", "{% if %}", "{{ messages[0].content.x.y }}", "{{ 1 + 'a' }}"])
def test_a_template_that_fails_is_one_sentence(tmp_path, template):
    path = write_checkpoint(tmp_path / "model").path
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(ThriftyError, match=r"^\[chat\] the chat template must take the messages; .+"):
        load(path).chat_prompt(MESSAGES)


def test_a_template_that_is_not_utf8_is_named(tmp_path):
    path = write_checkpoint(tmp_path / "model").path
    (path / "chat_template.jinja").write_bytes(b"abc\xff")
    with pytest.raises(ThriftyError, match=r"chat_template\.jinja must be UTF-8; byte 3 is not"):
        load(path).chat_prompt(MESSAGES)


def test_a_template_renders_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    template = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}]{% else %}({{ m.content }})"
        "{% endif %}\n{% if loop.last %}{% break %}{% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}>{{ bos_token }}{% endif %}"
    )
    path = write_checkpoint(tmp_path / "model").path
    tokenizer_config = {
        "chat_template": template,
        "bos_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    messages = [{"role": r, "content": c} for r, c in [("user", " a "), ("assistant", "b"), ("user", "c")]]
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    runtime = load(path)
    assert runtime.chat_prompt(messages)[0] == runtime.encode(expected)


def test_a_model_with_a_vocabulary_that_is_not_read_here_takes_token_ids(tmp_path):
    tiny = write_checkpoint(tmp_path / "model", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    to_gguf(open_folder(tiny.path), tmp_path / "whole.gguf")
    file = open_gguf(tmp_path / "whole.gguf")
    metadata = {key: value for key, value in file.metadata.items() if key != "tokenizer.huggingface.json"}
    tensors = [TensorToWrite(name, b.kind, b.shape, lambda b=b: b.data) for name, b in file.tensors.items()]
    save_gguf(tmp_path / "other.gguf", metadata | {"tokenizer.ggml.model": "bert"}, tensors)
    runtime, whole = load(tmp_path / "other.gguf"), load(tmp_path / "whole.gguf")
    assert runtime.tokenizer is None
    assert runtime.generate_tokens([1, 2], max_new_tokens=5) == whole.generate_tokens([1, 2], max_new_tokens=5)
    with pytest.raises(ThriftyError, match="vocabularies read here are gpt2 and llama; got bert; pass token ids"):
        runtime.encode("a")
    assert whole.encode("a") == TOKENIZER.encode("a").ids
