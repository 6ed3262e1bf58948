"""A step as one native call: the same bits whatever the threads and the batch, and the sizes that it promises."""

import numpy as np
import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import ThriftyError, native
from thrifty.runtime import load

if not native.available():
    pytest.skip("no native library", allow_module_level=True)

VARIANTS = {
    "bitnet": {},
    "mlp-bias": {"feed_forward": "mlp", "hidden_act": "gelu", "attention_bias": True},
    "dense": {"linear": "dense", "norm_placement": "pre"},
    "ugly": {"hidden_size": 54, "intermediate_size": 67, "num_attention_heads": 3, "num_key_value_heads": 1},
}


@pytest.fixture(params=VARIANTS)
def path(request, tmp_path):
    return write_checkpoint(tmp_path / "model", **VARIANTS[request.param]).path


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 300, n).tolist() for n in rng.integers(1, 300, count)]


@pytest.mark.parametrize("options", [{}, {"head_bits": 8, "cache_bits": 8}])
def test_bits_do_not_depend_on_threads(path, options):
    tokens = prompts(1, seed=5)[0] * 2
    expected = load(path, n_threads=1, **options)
    logits, made = expected.logits(tokens), expected.generate_tokens(tokens, max_new_tokens=8)
    for threads in (2, 3, 7):
        runtime = load(path, n_threads=threads, **options)
        np.testing.assert_array_equal(runtime.logits(tokens), logits)
        assert runtime.generate_tokens(tokens, max_new_tokens=8) == made


def test_bits_do_not_depend_on_the_batch(path):
    decoder = load(path, n_threads=2, cache_bits=8)._decoder
    caches = [decoder.new_cache(400) for _ in range(5)]
    alone = []
    for tokens, cache in zip(prompts(5), caches, strict=True):
        decoder.advance(tokens, cache)
        alone.append(decoder.advance([7], cache))
        cache.tokens.pop()
    np.testing.assert_array_equal(decoder.advance_batch([7] * 5, caches), np.stack(alone))


def test_bits_do_not_depend_on_the_chunks_of_a_prompt(path):
    decoder = load(path)._decoder
    tokens = prompts(1, seed=5)[0]
    whole, steps = decoder.new_cache(400), decoder.new_cache(400)
    expected = decoder.advance(tokens, whole)
    for token in tokens:
        logits = decoder.advance([token], steps)
    np.testing.assert_array_equal(logits, expected)


def test_batched_generation_is_that_of_each_prompt_alone(path):
    runtime = load(path)
    many = prompts(40)
    options = {"max_new_tokens": 9, "temperature": 0.8, "seed": 3}
    together = runtime.generate_tokens_batch(many, **options)
    assert together == [runtime.generate_tokens(tokens, **options) for tokens in many]
    assert runtime.generate_tokens_batch(many[:2], max_new_tokens=0) == [[], []]
    assert runtime.generate_batch([], max_new_tokens=1) == []


@pytest.mark.parametrize(("bits", "share"), [(16, 1e-2), (8, 4e-2)])
def test_a_narrow_cache_stays_near_the_exact_one(tmp_path, bits, share):
    path = write_checkpoint(tmp_path / "model", linear="dense").path
    tokens = prompts(1, seed=5)[0]
    expected = load(path, cache_bits=32).logits(tokens)
    difference = np.abs(load(path, cache_bits=bits).logits(tokens) - expected)
    assert 0 < difference.max() < share * np.ptp(expected)


@pytest.mark.parametrize(("bits", "share"), [(8, 3e-2), (4, 3e-1)])
def test_a_narrow_head_stays_near_the_exact_one(tmp_path, bits, share):
    path = write_checkpoint(tmp_path / "model").path
    tokens = prompts(1, seed=5)[0]
    expected = load(path)
    narrow = load(path, head_bits=bits)
    difference = np.abs(narrow.logits(tokens) - expected.logits(tokens))
    assert 0 < difference.max() < share * np.ptp(expected.logits(tokens))
    assert narrow.bytes_per_token < expected.bytes_per_token


@pytest.mark.parametrize(
    ("options", "text"),
    [({"head_bits": 16}, "head_bits must be 8, 4 or None"), ({"cache_bits": 4}, "cache_bits must be")],
)
def test_options_out_of_range(tmp_path, options, text):
    path = write_checkpoint(tmp_path / "model").path
    with pytest.raises(ThriftyError, match=text):
        load(path, **options)
