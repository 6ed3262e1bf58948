"""The runtime's logits against the model written out with the definitions of `thrifty.spec`."""

from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import TinyCheckpoint, write_checkpoint

from thrifty import native, spec
from thrifty.errors import ThriftyError
from thrifty.runtime import decoder as decoder_module
from thrifty.runtime import load

VARIANTS = {
    "bitnet": {},
    "relu2": {"hidden_act": "relu2"},
    "untied": {"tie_word_embeddings": False},
    "pre": {"norm_placement": "pre"},
    "mlp": {"feed_forward": "mlp", "hidden_act": "gelu"},
    "bias": {"attention_bias": True},
    "binary": {"linear": "binary"},
    "dense": {"linear": "dense", "attention_bias": True},
    "dense-pre-mlp": {"linear": "dense", "norm_placement": "pre", "feed_forward": "mlp"},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 4},
    "wide-heads": {"head_dim": 18},
    "ugly": {"hidden_size": 54, "intermediate_size": 67, "num_attention_heads": 3, "num_key_value_heads": 1},
    "theta-of-old": {"rope_parameters": None, "rope_theta": 500.0},
    "divides": {"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear"}},
    "latent": {"latent": True},
    "latent-binary": {"latent": True, "linear": "binary"},
}


def spec_logits(tiny: TinyCheckpoint, tokens: list[int]) -> np.ndarray:
    """The model, straight from the definitions."""
    c, f = tiny.config, tiny.floats
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    d = c.get("head_dim") or c["hidden_size"] // heads
    theta = (c["rope_parameters"] or c)["rope_theta"]
    cos, sin = spec.rope_tables(np.arange(len(tokens)), d, theta)
    eps = c["rms_norm_eps"]

    def linear(name, x, gain):
        bias = f.get(f"{name}.bias")
        if name not in tiny.codes:
            y = (x if gain is None else spec.rms_norm(x, gain, eps)) @ f[f"{name}.weight"].T
            return y if bias is None else y + bias
        codes, scale = tiny.codes[name]
        return spec.ternary_matmul(*spec.quantize_per_token(x, gain, eps, gain is not None), codes, float(scale), bias)

    x = f["model.embed_tokens.weight"][tokens]
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        gain = f[p + "input_layernorm.weight"]
        q, k, v = (linear(f"{p}self_attn.{n}_proj", x, gain).reshape(len(tokens), -1, d) for n in "qkv")
        assert q.shape[1:] == (heads, d)
        assert v.shape[1:] == (kv_heads, d)
        o = spec.attention(spec.apply_rope(q, cos, sin), spec.apply_rope(k, cos, sin), v, 0)
        x = x + linear(p + "self_attn.o_proj", o.reshape(len(tokens), -1), f.get(p + "self_attn.attn_sub_norm.weight"))
        gain = f[p + "post_attention_layernorm.weight"]
        up = linear(p + "mlp.up_proj", x, gain)
        if c.get("feed_forward", "glu") == "glu":
            inner = spec.glu(linear(p + "mlp.gate_proj", x, gain), up, c["hidden_act"])
        else:
            inner = spec.ACTIVATIONS[c["hidden_act"]](up)
        x = x + linear(p + "mlp.down_proj", inner, f.get(p + "mlp.ffn_sub_norm.weight"))
    head = f["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return spec.rms_norm(x, f["model.norm.weight"], eps) @ head.T


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to the odd activation code that rounds the other way after a sum in another order."""
    span = np.ptp(expected)
    assert logits.shape == expected.shape
    assert np.median(np.abs(logits - expected)) < 1e-5 * span
    assert np.abs(logits - expected).max() < 1e-2 * span
    best = np.sort(expected, -1)
    clear = best[:, -1] - best[:, -2] > 1e-3 * span
    assert (logits.argmax(-1) == expected.argmax(-1))[clear].all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_spec(tmp_path, variant):
    tiny = write_checkpoint(tmp_path / "model", **VARIANTS[variant])
    tokens = np.random.default_rng(1).integers(0, 300, 40).tolist()
    assert_close(load(tiny.path, cache_bits=32).logits(tokens), spec_logits(tiny, tokens))


@pytest.mark.parametrize("weight_format", ["i2", "base3"])
def test_weight_formats_agree_bit_for_bit(tmp_path, weight_format):
    tiny = write_checkpoint(tmp_path / "model")
    tokens = list(range(30))
    np.testing.assert_array_equal(
        load(tiny.path, cache_bits=32, weight_format=weight_format).logits(tokens),
        load(tiny.path, cache_bits=32).logits(tokens),
    )


def test_logits_equal_the_spec_over_many_chunks(tmp_path):
    tiny = write_checkpoint(tmp_path / "model")
    tokens = np.random.default_rng(2).integers(0, 300, 600).tolist()
    assert_close(load(tiny.path, cache_bits=32).logits(tokens), spec_logits(tiny, tokens))


@pytest.mark.parametrize("rows", [1, 3, 63, 128, 257])
def test_prefill_in_chunks_of_any_size(tmp_path, monkeypatch, rows):
    tiny = write_checkpoint(tmp_path / "model")
    tokens = np.random.default_rng(3).integers(0, 300, 300).tolist()
    expected = load(tiny.path, cache_bits=32).logits(tokens)
    monkeypatch.setattr(decoder_module, "PREFILL_ROWS", rows)
    assert_close(load(tiny.path, cache_bits=32).logits(tokens), expected)


def test_prefill_equals_step_by_step(tmp_path):
    runtime = load(write_checkpoint(tmp_path / "model").path, cache_bits=32)
    tokens = np.random.default_rng(4).integers(0, 300, 280).tolist()
    cache = runtime.new_cache()
    steps = np.stack([runtime._decoder.advance([token], cache) for token in tokens])
    assert_close(steps, runtime.logits(tokens))


def test_the_future_changes_nothing(tmp_path):
    runtime = load(write_checkpoint(tmp_path / "model").path, cache_bits=32)
    tokens = list(range(50))
    changed = [*tokens[:30], 7, *tokens[31:]]
    np.testing.assert_array_equal(runtime.logits(changed)[:30], runtime.logits(tokens)[:30])
    assert (runtime.logits(changed)[30:] != runtime.logits(tokens)[30:]).any()


@pytest.mark.skipif(not native.available(), reason="needs the native library")
def test_tokens_that_do_not_fit_or_were_not_computed_are_not_kept(tmp_path, monkeypatch):
    decoder: Any = load(write_checkpoint(tmp_path).path, max_context=40)._decoder
    cache = decoder.new_cache(40)
    with pytest.raises(ThriftyError, match=r"tokens must fit the 40 positions of the cache; got 41; make a larger one"):
        decoder.advance([1] * 41, cache)
    with pytest.raises(ThriftyError, match="a step takes at most 32 sequences; got 33"):
        decoder.advance_batch([1] * 33, [decoder.new_cache(8) for _ in range(33)])
    with monkeypatch.context() as patch:
        patch.setattr(decoder._program, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            decoder.advance([1, 2, 3], cache)
    assert len(cache) == 0
    np.testing.assert_array_equal(decoder.advance([1, 2, 3], cache), decoder.advance([1, 2, 3], decoder.new_cache(40)))
