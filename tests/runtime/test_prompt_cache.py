import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import ThriftyError, native
from thrifty.checkpoint import Tensor, open_folder, save_safetensors
from thrifty.runtime import Conversation, load
from thrifty.runtime.prompt_cache import model_digest

SAMPLED: dict[str, Any] = {
    "temperature": 1.5,
    "top_k": 40,
    "repetition_penalty": 1.1,
    "ignore_eos": True,
    "max_new_tokens": 12,
}
PROMPT = [i * 7 % 256 for i in range(300)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tie_word_embeddings=False).path


def reads(runtime, monkeypatch) -> list[int]:
    """Numbers of tokens that `runtime` computes from now on, call by call."""
    read, advance = [], runtime._decoder.advance
    monkeypatch.setattr(runtime._decoder, "advance", lambda t, c: (read.append(len(t)), advance(t, c))[1])
    return read


@pytest.mark.parametrize("cache_bits", [32, 16, 8])
def test_a_file_changes_no_token_and_saves_the_work(path, tmp_path, monkeypatch, cache_bits):
    runtime, file = load(path, cache_bits=cache_bits), tmp_path / "prompt"
    prompts = [PROMPT[:200], PROMPT[:200], PROMPT, [*PROMPT[:290], 1, 2], [9, *PROMPT[:50]], PROMPT[:80]]
    expected = [runtime.generate_tokens(prompt, seed=i, **SAMPLED) for i, prompt in enumerate(prompts)]
    read = reads(runtime, monkeypatch)
    firsts = []
    for i, prompt in enumerate(prompts):
        firsts.append(len(read))
        assert runtime.generate_tokens(prompt, seed=i, prompt_cache=file, **SAMPLED) == expected[i]
    # Made; used but for the token whose logits are wanted; extended; used and left; of no use; shorter than the file.
    assert [read[i] for i in firsts] == [200, 1, 100, 2, 51, 1]


@pytest.mark.parametrize("cache_bits", [32, 16, 8])
@pytest.mark.parametrize("count", [1, 16, 63, 299])
def test_restored_positions_have_the_same_bits(path, tmp_path, cache_bits, count):
    runtime = load(path, cache_bits=cache_bits)
    assert runtime.save_prompt(tmp_path / "prompt", PROMPT) == 300
    whole, restored = (load(path, cache_bits=cache_bits)._decoder for _ in range(2))
    expected = whole.advance(PROMPT, whole.new_cache(700))
    from thrifty.runtime.prompt_cache import PromptCache

    cache = restored.new_cache(310)
    file = PromptCache(tmp_path / "prompt", runtime._folder, cache)
    file.restore(cache, PROMPT[:count])
    assert cache.tokens == PROMPT[:count]
    np.testing.assert_array_equal(restored.advance(PROMPT[count:], cache), expected)


def test_another_process_goes_on_from_the_file(path, tmp_path):
    runtime, file = load(path), tmp_path / "prompt"
    code = f"""
    from thrifty.runtime import load
    load({str(path)!r}).save_prompt({str(file)!r}, {PROMPT!r})
    """
    subprocess.check_call([sys.executable, "-c", textwrap.dedent(code)])
    expected = runtime.generate_tokens([*PROMPT, 5], seed=1, **SAMPLED)
    assert runtime.generate_tokens([*PROMPT, 5], seed=1, prompt_cache=file, **SAMPLED) == expected


def test_only_the_positions_in_use_are_kept(path, tmp_path):
    runtime = load(path, cache_bits=8)
    runtime.save_prompt(tmp_path / "prompt", PROMPT[:10])
    # 2 layers, 2 kv heads of 12: keys, values and their scales; and tokens and the header.
    assert (tmp_path / "prompt").stat().st_size < 2 * 2 * 2 * 10 * (12 + 4) + 10 * 4 + 1024
    assert [f.name for f in tmp_path.iterdir()] == ["prompt"]


def test_a_batch_computes_what_its_prompts_share_once(path, monkeypatch):
    runtime = load(path)
    prompts = [PROMPT[:200], [*PROMPT[:150], 3, 4], [8, 8], [*PROMPT[:150], 3, 9, 9], PROMPT[:200]]
    options: dict[str, Any] = {"seed": 3, **SAMPLED}
    expected = [runtime.generate_tokens(prompt, **options) for prompt in prompts]
    read = reads(runtime, monkeypatch)
    assert runtime.generate_tokens_batch(prompts, **options) == expected
    assert read[:5] == [200, 2, 2, 2, 1]


def test_a_conversation_begins_with_the_file(path, tmp_path, monkeypatch):
    runtime, file = load(path), tmp_path / "prompt"
    system = "Be brief, and as kind as the weather allows. " * 3
    options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
    expected = [list(Conversation(runtime, system, **options).ask(text)) for text in ("hi", "ho")]
    for text, answer in zip(("hi", "ho"), expected, strict=True):
        read = reads(runtime, monkeypatch)
        chat = Conversation(runtime, system, prompt_cache=file, **options)
        assert list(chat.ask(text)) == answer
        assert (read[0] < 30) == (text == "ho")
        monkeypatch.undo()
        list(chat.ask("and then?"))


def refusals(path: Path, file: Path) -> dict[str, tuple]:
    """By what an error must say: a runtime that must refuse, and what is done to a sound file before."""
    config_bits = file.read_bytes().replace(b'"cache_bits":"16"', b'"cache_bits":"32"')

    def other(**fields):
        return load(write_checkpoint(file.parent / "other", tie_word_embeddings=False, **fields).path, cache_bits=16)

    same = load(path, cache_bits=16)
    return {
        "be of this model; it is of another": (lambda: other(seed=1), lambda: None),
        "it has 16 bits and the runtime 8": (lambda: load(path, cache_bits=8), lambda: None),
        "it has 32 bits and the runtime 16": (lambda: same, lambda: file.write_bytes(config_bits)),
        "it is cut short": (lambda: same, lambda: file.write_bytes(file.read_bytes()[:-1])),
        "or something else": (lambda: same, lambda: file.write_bytes(b"")),
        "it is another file": (lambda: same, lambda: save_safetensors(file, {"x": Tensor.of(np.zeros(3))})),
        "delete it, and it is made anew": (lambda: same, lambda: (file.unlink(), file.mkdir())),
    }


@pytest.mark.parametrize("case", range(7))
def test_a_file_that_does_not_belong_is_refused_and_kept(path, tmp_path, case):
    if not native.available():
        pytest.skip("caches of numpy have 32 bits")
    file = tmp_path / "prompt"
    load(path, cache_bits=16).save_prompt(file, PROMPT[:20])
    message, (runtime, spoil) = list(refusals(path, file).items())[case]
    spoil()
    before = file.read_bytes() if file.is_file() else None
    for call in (runtime().generate_tokens, lambda p, prompt_cache: runtime().save_prompt(prompt_cache, p)):
        with pytest.raises(ThriftyError, match=message) as caught:
            call(PROMPT[:30], prompt_cache=file)
        assert str(file) in str(caught.value)
    assert (file.read_bytes() if file.is_file() else None) == before


def test_tensors_of_other_shapes_are_refused(path, tmp_path):
    from thrifty.checkpoint.safetensors import open_safetensors, read_metadata

    file = tmp_path / "prompt"
    runtime = load(path)
    runtime.save_prompt(file, PROMPT[:20])
    tensors = open_safetensors(file)
    tensors["tokens"] = Tensor.of(tensors["tokens"].data[:19].copy())
    save_safetensors(file, tensors, read_metadata(file))
    with pytest.raises(ThriftyError, match="their shapes differ"):
        runtime.generate(PROMPT, prompt_cache=file)


def test_a_place_that_is_not_there_is_named_before_anything_is_computed(path, tmp_path):
    with pytest.raises(ThriftyError, match="make the folder"):
        load(path).stream_tokens(PROMPT, prompt_cache=tmp_path / "no" / "prompt")


def test_caches_of_another_runtime_are_refused(path):
    runtime = load(path)
    with pytest.raises(ThriftyError, match="new_cache"):
        runtime.stream_tokens(PROMPT, cache=load(path, max_context=10).new_cache())


def test_the_digest_sees_every_tensor_and_the_config(tmp_path):
    sizes: dict[str, Any] = {"vocab_size": 3000, "tokenizer": False}
    first = model_digest(open_folder(write_checkpoint(tmp_path / "a", **sizes).path))
    assert first == model_digest(open_folder(write_checkpoint(tmp_path / "b", **sizes).path))
    assert first != model_digest(open_folder(write_checkpoint(tmp_path / "b", rms_norm_eps=1e-6, **sizes).path))
    folder = open_folder(tmp_path / "a")
    for name, tensor in folder.tensors.items():
        data = tensor.data.copy()
        data.reshape(-1)[-1] ^= 1
        changed = type(folder)(folder.path, folder.config, folder.tensors | {name: Tensor(tensor.dtype, data)})
        assert model_digest(changed) != first, name
