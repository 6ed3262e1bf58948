"""What holds of every mixture of mixers: bits, states that cannot be taken back, and what a long text costs."""

from typing import Any

import numpy as np
import pytest

from thrifty import native
from thrifty.native import _library
from thrifty.runtime import Runtime, load

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

DOGE = {"token_mixers": "dynamic_mask", "keep_window_size": 37, "residual": "scaled", "qk_norm": True}
EXPERTS = {"feed_forward": "cdmoe", "num_experts": 49, "num_experts_per_tok": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "matmulfree": {"token_mixers": "mlgru", "attention_bias": True},
    "doge": {**DOGE, "linear": "dense", "norm_placement": "pre"},
    "doge-all-keys": {**DOGE, "dynamic_mask_selection": "none"},
    "doge-heads": {**DOGE, "dt_heads": "attention", "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 18},
    "doge-moe": {**DOGE, **EXPERTS, "mlp_bias": True},
    "cheems": {**DOGE, "linear": "dense", "token_mixers": ["ssd", "dynamic_mask"], "norm_placement": "pre"},
    "mixture": {
        **DOGE,
        **EXPERTS,
        "router": "product_key_heads",
        "num_experts_heads": 2,
        "expert_retrieval_size": 6,
        "norm_topk_prob": True,
        "token_mixers": ["attention", "mlgru", "ssd", "dynamic_mask"],
        "num_hidden_layers": 4,
    },
}
BOUNDED = ("matmulfree", "doge", "doge-heads", "doge-moe", "cheems")
TEXT = np.random.default_rng(0).integers(0, 300, 260).tolist()
SAMPLED: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "max_new_tokens": 12, "seed": 1}


def write(folder, **fields: Any):
    """A random model's folder."""
    from thrifty.models import ThriftyConfig, ThriftyForCausalLM

    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 60, "intermediate_size": 67, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 1500}
    model = ThriftyForCausalLM(ThriftyConfig(**(sizes | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):
                parameter.uniform_(-2, -0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def path(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("family") / "model", **VARIANTS[request.param])


@pytest.fixture(scope="module")
def runtime(path) -> Runtime:
    return load(path, n_threads=2)


def test_numpy_computes_the_same(path, runtime, monkeypatch):
    expected = runtime.logits(TEXT[:150])
    monkeypatch.setattr(_library, "find", lambda: (None, "taken away for a test"))
    _library.load.cache_clear()
    try:
        numpy = load(path)
        logits = numpy.logits(TEXT[:150])
        assert np.median(np.abs(logits - expected)) < 1e-5 * np.ptp(expected)
        assert np.abs(logits - expected).max() < 2e-2 * np.ptp(expected)
        made = numpy.generate_tokens(TEXT[:40], **SAMPLED)
        assert made == numpy.generate_tokens_batch([TEXT[:40], TEXT[:41]], **SAMPLED)[0]
    finally:
        monkeypatch.undo()
        _library.load.cache_clear()


needs_library = pytest.mark.skipif(not native.available(), reason="no native library")


@needs_library
@pytest.mark.parametrize("cache_bits", [32, 16, 8])
def test_bits_depend_on_nothing_but_the_text(path, cache_bits):
    expected = load(path, n_threads=1, cache_bits=cache_bits).logits(TEXT)
    for threads in (2, 3, 7):
        runtime = load(path, n_threads=threads, cache_bits=cache_bits)
        np.testing.assert_array_equal(runtime.logits(TEXT), expected)
    decoder = runtime._decoder
    caches = [decoder.new_cache(300) for _ in range(3)]
    for start, cache in zip((0, 70, 130), caches, strict=True):
        for first in range(0, 100, 33):
            decoder.advance(TEXT[start + first : start + min(first + 33, 100)], cache)
    steps = [decoder.advance_batch([TEXT[start + at] for start in (0, 70, 130)], caches)[0] for at in range(100, 130)]
    np.testing.assert_array_equal(np.stack(steps), expected[100:130])


def test_batches_chats_drafts_and_files_change_no_token(path, runtime, tmp_path):
    prompts = [TEXT[:50], TEXT[:50], TEXT[:90], TEXT[20:100], TEXT[:49]]
    expected = [runtime.generate_tokens(prompt, **SAMPLED) for prompt in prompts]
    assert runtime.generate_tokens_batch(prompts, **SAMPLED) == expected
    cache = runtime.new_cache()
    file = tmp_path / "prompt"
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert runtime.generate_tokens(prompt, cache=cache, draft=4, **SAMPLED) == tokens
        for _ in range(2):
            assert runtime.generate_tokens(prompt, prompt_cache=file, **SAMPLED) == tokens
    repeated = (TEXT[:8] * 12)[:90]
    tokens = runtime.generate_tokens(repeated, **SAMPLED)
    assert runtime.generate_tokens(repeated, draft=4, **SAMPLED) == tokens
    assert runtime.generate_tokens(repeated + tokens[:5], cache=cache, **SAMPLED) == runtime.generate_tokens(
        repeated + tokens[:5], **SAMPLED
    )


def test_a_prompt_read_before_is_not_read_again(path, runtime, tmp_path, monkeypatch):
    file, prompt = tmp_path / "prompt", TEXT[:80]
    runtime.save_prompt(file, prompt)
    expected = runtime.generate_tokens([*prompt, 5, 6], **SAMPLED)
    read = []
    advance = runtime._decoder.advance
    monkeypatch.setattr(
        runtime._decoder, "advance", lambda tokens, cache: read.append(len(tokens)) or advance(tokens, cache)
    )
    assert runtime.generate_tokens([*prompt, 5, 6], prompt_cache=file, **SAMPLED) == expected
    runtime.generate_tokens(prompt, prompt_cache=file, **(SAMPLED | {"max_new_tokens": 1}))
    assert sum(read) - 11 < 10


@needs_library
@pytest.mark.parametrize("variant", BOUNDED)
def test_a_long_text_takes_no_more_memory(variant, tmp_path):
    decoder = load(write(tmp_path / "model", **VARIANTS[variant]))._decoder
    assert decoder.new_cache(1500).nbytes == decoder.new_cache(64).nbytes
