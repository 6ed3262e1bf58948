import json
import math
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import ThriftyError, native, spec
from thrifty.errors import ThriftyWarning
from thrifty.native._library import FORMAT_IDS
from thrifty.runtime import Conversation, load
from thrifty.runtime.decoder import NativeDecoder
from thrifty.runtime.projection import Head

SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tie_word_embeddings=False).path


@pytest.fixture(scope="module")
def runtime(path):
    return load(path)


def test_greedy_tokens_are_the_best_of_the_logits(runtime):
    prompt = [5, 6, 7]
    made = runtime.generate_tokens(prompt, max_new_tokens=20, ignore_eos=True)
    logits = runtime.logits(prompt + made)[len(prompt) - 1 : -1]
    assert made == logits.argmax(-1).tolist()


def test_stream_is_generate(runtime):
    options = {"max_new_tokens": 40, "seed": 3, **SAMPLED}
    parts = list(runtime.stream("héllo", **options))
    assert "".join(parts) == runtime.generate("héllo", **options)
    assert runtime.decode(runtime.generate_tokens("héllo", **options)) == "".join(parts)
    assert len(parts) > 1


def test_a_seed_repeats_and_another_differs(runtime):
    made = [runtime.generate_tokens("x", max_new_tokens=30, seed=seed, **SAMPLED) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_tokens_do_not_depend_on_what_ran_before(runtime):
    first = runtime.generate_tokens("once upon", max_new_tokens=20, seed=0, **SAMPLED)
    runtime.generate_tokens("something else", max_new_tokens=30, seed=1, **SAMPLED)
    assert runtime.generate_tokens("once upon", max_new_tokens=20, seed=0, **SAMPLED) == first


def test_interleaved_and_threaded_sequences_do_not_disturb_each_other(runtime):
    alone = [runtime.generate_tokens([i, 9], max_new_tokens=12, seed=i, **SAMPLED) for i in range(3)]
    streams = [runtime.stream_tokens([i, 9], max_new_tokens=12, seed=i, **SAMPLED) for i in range(3)]
    assert list(map(list, zip(*zip(*streams, strict=True), strict=True))) == alone
    results = {}

    def run(i):
        results[i] = runtime.generate_tokens([i, 9], max_new_tokens=12, seed=i, **SAMPLED)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(3)] == alone


@pytest.mark.parametrize("weight_format", ["i2", "base3"])
def test_thread_counts_give_the_same_bits(path, weight_format):
    tokens = list(range(40))
    expected = load(path, n_threads=1).logits(tokens)
    for n_threads in (2, 3, 7):
        runtime = load(path, weight_format=weight_format, n_threads=n_threads)
        np.testing.assert_array_equal(runtime.logits(tokens), expected)


@pytest.mark.skipif(not native.available(), reason="nothing to measure")
def test_the_format_is_chosen_by_timing_both(path, monkeypatch):
    def chosen_format() -> str:
        decoder = load(path, n_threads=2)._decoder
        assert isinstance(decoder, NativeDecoder)
        return decoder.weight_format

    assert chosen_format() in ("i2", "base3")
    run = native.Program.run
    for slow, chosen in (("i2", "base3"), ("base3", "i2")):

        def delayed(self, *arguments, slow=FORMAT_IDS[slow], **options):
            if any(op.code == native.OpCode.MATMUL and op.n[0] == slow for op in self.ops):
                time.sleep(0.005)
            assert self.n_threads == 2
            return run(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(native.Program, "run", delayed)
            assert chosen_format() == chosen


def test_generation_config_gives_the_defaults(tmp_path):
    path = write_checkpoint(tmp_path / "model").path
    fields = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_new_tokens": 9, "eos_token_id": []}
    (path / "generation_config.json").write_text(json.dumps(fields))
    runtime = load(path)
    explicit = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_new_tokens": 9}
    assert runtime.generate_tokens("a", seed=0) == runtime.generate_tokens("a", seed=0, **explicit)
    assert len(runtime.generate_tokens("a", seed=0)) == 9
    assert runtime.generate_tokens("a", temperature=0) == runtime.generate_tokens("a", temperature=0, seed=8)


@pytest.mark.parametrize("fields", [{"temperature": "hot"}, {"top_k": -1}, {"eos_token_id": "x"}, {"top_p": [1]}])
def test_a_malformed_generation_config_is_named(tmp_path, fields):
    path = write_checkpoint(tmp_path / "model").path
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True} | fields))
    with pytest.raises(ThriftyError, match=r"generation_config\.json"):
        load(path)


def test_an_end_token_ends_the_text(tmp_path, runtime, path):
    made = runtime.generate_tokens("ab", max_new_tokens=30, ignore_eos=True)
    end = made[10]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 299]}))
    try:
        assert load(path).generate_tokens("ab", max_new_tokens=30) == made[: made.index(end)]
    finally:
        (path / "generation_config.json").unlink()


def test_stop_strings_are_left_out(runtime):
    text = runtime.generate("ab", max_new_tokens=30, ignore_eos=True)
    stop = text[4:6]
    assert runtime.generate("ab", max_new_tokens=30, ignore_eos=True, stop=stop) == text[: text.index(stop)]
    assert runtime.generate("ab", max_new_tokens=30, ignore_eos=True, stop=["\0\0\0", ""]) == text


def test_the_context_is_never_silently_exceeded(path):
    runtime = load(path, max_context=20)
    assert len(runtime.generate_tokens(list(range(20)), ignore_eos=True)) == 1
    assert len(runtime.generate_tokens(list(range(15)), ignore_eos=True)) == 6
    assert len(runtime.generate_tokens(list(range(15)), ignore_eos=True, max_new_tokens=6)) == 6
    for call, message in [
        (lambda: runtime.generate_tokens(list(range(21))), "20 tokens .the context.; got 21; shorten"),
        (lambda: runtime.generate_tokens(list(range(15)), max_new_tokens=7), "lower max_new_tokens to 6"),
        (lambda: runtime.stream("x" * 30), "context"),
        (lambda: runtime.logits(list(range(21))), "context"),
        (lambda: runtime.bits_per_byte("abc", window=21), "window"),
    ]:
        with pytest.raises(ThriftyError, match=message):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"repetition_penalty": 0},
        {"max_new_tokens": -1},
    ],
)
def test_options_out_of_range(runtime, options):
    with pytest.raises(ThriftyError, match=next(iter(options))):
        runtime.generate("a", **options)


def test_tokens_out_of_range_and_empty_prompts(tmp_path, runtime):
    for tokens in ([300], [-1]):
        with pytest.raises(ThriftyError, match="from 0 to 299"):
            runtime.logits(tokens)
    assert runtime.generate_tokens("", max_new_tokens=3) == runtime.generate_tokens([256], max_new_tokens=3)
    endless = load(write_checkpoint(tmp_path / "model", eos_token_id=None).path)
    with pytest.raises(ThriftyError, match="must have a token"):
        endless.generate("")


def test_more_threads_than_processors_warn(path, recwarn):
    load(path, n_threads=native.cpu_threads())
    assert not recwarn
    with pytest.warns(ThriftyWarning, match=f"at most {native.cpu_threads()}, .*; got 500; results are the same"):
        many = load(path, n_threads=500)
    np.testing.assert_array_equal(many.logits([1, 2, 3]), load(path).logits([1, 2, 3]))


@pytest.mark.parametrize(
    "options", [{"weight_format": "fp8"}, {"n_threads": 0}, {"max_context": 0}, {"max_context": 701}]
)
def test_options_of_load_out_of_range(path, options):
    with pytest.raises(ThriftyError, match=next(iter(options))):
        load(path, **options)


def expected_nats(runtime, text: str, window: int, stride: int) -> float:
    """Every token by the definition of windows, one forward a token."""
    tokens = [256, *runtime.encode(text)]
    nats = 0.0
    for at in range(1, len(tokens)):
        window_index = max(0, -(-(at - window) // stride))
        stop = min(1 + window + window_index * stride, len(tokens))
        logits = runtime.logits(tokens[max(0, stop - 1 - window) : at])[-1].astype(np.float64)
        nats += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[at]]
    return nats


@pytest.mark.parametrize(("window", "stride"), [(700, 350), (16, 8), (16, 16), (5, 1), (1, 1), (20, 3)])
def test_bits_per_byte_and_perplexity(runtime, window, stride):
    text = "The dog jumpéd over the fence, twice."
    nats = expected_nats(runtime, text, window, stride)
    assert runtime.bits_per_byte(text, window, stride) == pytest.approx(
        nats / math.log(2) / len(text.encode()), rel=1e-3
    )
    assert math.log(runtime.perplexity(text, window, stride)) == pytest.approx(
        nats / len(runtime.encode(text)), rel=1e-3
    )


def test_the_first_token_is_paid_for_without_a_start_token(tmp_path):
    runtime = load(write_checkpoint(tmp_path / "model", eos_token_id=None).path)
    assert runtime.bits_per_byte("a") == pytest.approx(math.log2(300))
    with pytest.raises(ThriftyError, match="at least one token"):
        runtime.perplexity("")


def test_a_cache_of_a_shared_prefix_saves_work(runtime, monkeypatch):
    read = []
    advance = runtime._decoder.advance
    monkeypatch.setattr(runtime._decoder, "advance", lambda t, c: (read.append(len(t)), advance(t, c))[1])
    cache, prompt = runtime.new_cache(), list(range(60))
    first = runtime.generate_tokens(prompt, max_new_tokens=5, ignore_eos=True, cache=cache)
    assert read == [60, 1, 1, 1, 1]
    again = runtime.generate_tokens([*prompt, 9], max_new_tokens=5, ignore_eos=True, cache=cache)
    assert read[5] == 1
    assert again == runtime.generate_tokens([*prompt, 9], max_new_tokens=5, ignore_eos=True)
    assert runtime.generate_tokens(prompt, max_new_tokens=5, ignore_eos=True, cache=cache) == first


def test_conversation_keeps_messages_and_an_interrupted_answer(runtime):
    chat = Conversation(runtime, "Be brief.", max_new_tokens=8, ignore_eos=True)
    answer = "".join(chat.ask("hi"))
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[-1]["content"] == answer.strip()
    stream = chat.ask("more")
    part = next(stream)
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": part.strip()}
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(ThriftyError, match="context"):
        chat.ask("x" * 1000)
    assert len(chat.messages) == 1


def test_a_head_kept_in_16_bits_gives_the_same_logits(path):
    weight = load(path)._folder.tensors["lm_head.weight"]
    wide = Head(weight, n_threads=2)
    for rows in (1, 3):
        x = np.random.default_rng(rows).normal(size=(rows, 48)).astype(np.float32)
        np.testing.assert_allclose(Head(weight)(x), wide(x), rtol=1e-5, atol=1e-5)
    for block_bytes in (1, 4 * 48 * 7, 1 << 20):
        narrow = Head(weight, limit=0, block_bytes=block_bytes)
        assert narrow.nbytes * 2 == wide.nbytes
        for rows in (1, 3):
            x = np.random.default_rng(rows).normal(size=(rows, 48)).astype(np.float32)
            np.testing.assert_allclose(narrow(x), wide(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_bits", [None, 8, 4])
def test_without_the_native_library(path, monkeypatch, head_bits):
    expected = load(path, cache_bits=32, head_bits=head_bits).logits(list(range(20)))
    for module in ("_library", "_packed", "_quantize"):
        monkeypatch.setattr(f"thrifty.native.{module}.load", lambda: None)
    assert not native.available()
    logits = load(path, head_bits=head_bits).logits(list(range(20)))
    assert np.median(np.abs(logits - expected)) < 1e-4 * np.ptp(expected)
    assert np.abs(logits - expected).max() < 1e-2 * np.ptp(expected)


def test_activations_are_those_of_the_spec():
    from thrifty.runtime.activation import activation

    x = np.concatenate([np.linspace(-200, 200, 4001), [0.0, -0.0]]).astype(np.float32)
    for name, act in spec.ACTIVATIONS.items():
        out = np.full_like(x, np.nan)
        with np.errstate(over="ignore"):
            activation(name)(x, out)
        np.testing.assert_allclose(out, act(x), rtol=1e-5, atol=1e-35)


def test_running_imports_no_framework(path):
    code = f"""
    import sys
    from thrifty.runtime import load
    load({str(path)!r}).generate("a", max_new_tokens=2)
    print([m for m in ("torch", "transformers", "keras", "jax", "jinja2", "typer", "rich") if m in sys.modules])
    """
    assert subprocess.check_output([sys.executable, "-c", textwrap.dedent(code)], text=True) == "[]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("vocab_size", [300, 80_000])
def test_anonymous_memory_is_weights_and_cache_and_little_more(tmp_path, vocab_size):
    """The peak, the interpreter's own memory included, is at most the checkpoint's bytes, the cache and 100 MB."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    path = write_checkpoint(tmp_path / "model", **(sizes | {"vocab_size": vocab_size})).path
    code = """
    import sys, threading, time
    from thrifty.runtime import load
    def anonymous():
        return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
    peak, done = anonymous(), False
    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    runtime = load(sys.argv[1])
    runtime.generate_tokens([i % 300 for i in range(600)], max_new_tokens=3, ignore_eos=True)
    done = True
    watcher.join()
    print(max(peak, anonymous()))
    """
    peak = int(subprocess.check_output([sys.executable, "-c", textwrap.dedent(code), str(path)]))
    cache = 2 * 4 * 2 * 64 * 768 * 4
    assert peak <= (path / "model.safetensors").stat().st_size + cache + 100 * 2**20
