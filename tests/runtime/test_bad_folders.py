"""Folders as they come: whatever their JSON files hold, a caller sees text or a ThriftyError."""

import json
import random
import shutil

import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import ThriftyError, native
from thrifty.checkpoint.chat_format import CHAT_TEMPLATE
from thrifty.runtime import load

FILES = {
    "generation_config.json": {
        "bos_token_id": 256,
        "eos_token_id": [256],
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "max_new_tokens": 4,
    },
    "tokenizer_config.json": {
        "bos_token": {"content": "<|end|>", "special": True},
        "eos_token": "<|end|>",
        "model_max_length": 128,
        "chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    },
}
VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**24, 10**12, 2**63, 10**400, 0.0, -0.5, 1e-300, 1e-40, 1e300),
    *(float("inf"), float("-inf"), float("nan"), "", "a", "1", "\ud800", "{{ 1/0 }}", "{% if %}", CHAT_TEMPLATE),
    *([], [1], [-1], [None], ["a"], [{"name": "default", "template": 3}], {}, {"a": 1}, {"rope_theta": 1e-300}),
]


def changed(content, rng):
    """A copy of a JSON value with one entry, somewhere in it, replaced, removed or added."""
    content = json.loads(json.dumps(content))
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if not (isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7):
            break
        place = place[key]
    if rng.random() < 0.1:
        del place[key]
    else:
        place[key] = rng.choice(VALUES)
    return content


def broken(text, rng):
    """The bytes of a file, some of them overwritten, or cut."""
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] = rng.choice(b'\xff\x00{}[]",:0-9e\\u')
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def use(path):
    runtime = load(path, weight_format="i2", n_threads=1)
    runtime.generate("a", seed=0)
    runtime.generate_tokens([], max_new_tokens=2)
    runtime.chat_prompt([{"role": "user", "content": "hi"}])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("whole") / "model").path
    for name, content in FILES.items():
        (path / name).write_text(json.dumps(content))
    use(path)
    return path


@pytest.mark.parametrize("backend", ["native", "numpy"])
@pytest.mark.parametrize("name", ["config.json", *FILES])
def test_changed_json_is_used_or_refused(whole, tmp_path, monkeypatch, name, backend):
    if backend == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)
    path = shutil.copytree(whole, tmp_path / "model")
    text = (whole / name).read_text()
    content, refused = json.loads(text), 0
    rng = random.Random(f"{name} {backend}")
    for _ in range(120):
        data = broken(text, rng) if rng.random() < 0.2 else json.dumps(changed(content, rng)).encode()
        (path / name).write_bytes(data)
        try:
            use(path)
        except ThriftyError:
            refused += 1
        except BaseException as error:
            pytest.fail(f"{type(error).__name__}: {error} with {data!r}")
    assert 10 < refused < 120


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0; got -1"),
        ({"top_k": float("inf")}, "generation_config.json must hold numbers"),
        ({"temperature": float("inf"), "do_sample": True}, "temperature must be at least 0, and finite; got inf"),
    ],
)
def test_generation_config_is_checked_when_it_is_read(whole, tmp_path, fields, message):
    path = shutil.copytree(whole, tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(ThriftyError, match=message):
        load(path)


@pytest.mark.parametrize("fields", [{"rms_norm_eps": 1e300}, {"rms_norm_eps": 10**400}, {"rope_theta": 1e-300}])
def test_numbers_of_the_config_are_float32(tmp_path, fields):
    fields = {"rope_parameters": None} | fields
    with pytest.raises(ThriftyError, match="must be a positive number"):
        load(write_checkpoint(tmp_path / "model", **fields).path)


def test_the_most_positions_cost_nothing_until_they_are_used(tmp_path):
    path = write_checkpoint(tmp_path / "model", max_position_embeddings=2**24).path
    few = write_checkpoint(tmp_path / "few", max_position_embeddings=64).path
    expected = load(few).generate_tokens([1, 2], max_new_tokens=9, ignore_eos=True)
    assert load(path).generate_tokens([1, 2], max_new_tokens=9, ignore_eos=True) == expected
    with pytest.raises(ThriftyError, match="max_position_embeddings' must be at most 16777216"):
        load(write_checkpoint(tmp_path / "more", max_position_embeddings=10**12).path)


def test_what_exceeds_the_memory_is_one_sentence(whole, monkeypatch):
    runtime = load(whole)

    def full(*_):
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr(runtime._decoder, "new_cache", full)
    with pytest.raises(ThriftyError, match="must fit in memory; Unable to allocate 3 TiB; give a smaller context"):
        runtime.generate("a")
    monkeypatch.setattr("thrifty.runtime.runtime.make_decoder", full)
    with pytest.raises(ThriftyError, match="Unable to allocate 3 TiB"):
        load(whole)


def test_half_a_character_is_no_text(whole):
    with pytest.raises(ThriftyError, match="characters that UTF-8 has"):
        load(whole).generate("a\udcff")
