"""Every Keras layer against the spec, on the same arrays, on the backend that KERAS_BACKEND names."""

import numpy as np
import pytest
from keras import ops

from thrifty import spec
from thrifty.keras.layers import CachedMultiHeadAttention, DenseMML, RMSNorm, RotaryPositionalEmbedding

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def close(actual, expected: np.ndarray) -> None:
    atol = spec.TOLERANCES["float32"] * np.abs(expected).max()
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (2, 3, 257), (2, 2, 2, 500)])
def test_rms_norm(shape):
    x, layer = array(*shape), RMSNorm()
    layer.build(shape)
    layer.gain.assign(array(shape[-1]))
    close(layer(x), spec.rms_norm(x, ops.convert_to_numpy(layer.gain)))


def dense(x: np.ndarray, layer: DenseMML) -> np.ndarray:
    """What a layer must answer, by the spec."""
    kernel, gain = (None if v is None else ops.convert_to_numpy(v) for v in (layer.kernel, layer.gain))
    scale = spec.absmean(kernel, np, spec.round_bf16)
    codes = spec.ternary_codes(kernel, scale, np).astype(np.int8).T
    bias = None if layer.bias is None else ops.convert_to_numpy(layer.bias)
    x_codes, x_scales = spec.quantize_per_token(x.reshape(-1, x.shape[-1]), gain, norm=layer.norm)
    return spec.ternary_matmul(x_codes, x_scales, codes, scale, bias).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("shape", "units"), [((1, 1), 3), ((4, 63), 257), ((2, 3, 500), 63), ((1, 257), 1)])
def test_dense_and_its_packed_form(norm, shape, units):
    x, layer = array(*shape), DenseMML(units, norm=norm, bias_initializer="random_normal")
    layer.build(shape)
    if norm:
        layer.gain.assign(array(shape[-1]))
    expected = dense(x, layer)
    close(layer(x), expected)
    layer.pack()
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), expected)


@pytest.mark.parametrize("offset", [0, 1, 700])
def test_rotary_positional_embedding(offset):
    x = array(2, 63, 3, 16)
    tables = spec.rope_tables(np.arange(offset, offset + 63), 16, 500_000.0)
    close(RotaryPositionalEmbedding(max_wavelength=500_000.0)(x, offset=offset), spec.apply_rope(x, *tables))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 4)])
def test_cached_multi_head_attention(heads, kv_heads):
    """With projections that only tell the heads apart, it is the spec's attention."""
    T, cached, d = 5, 58, 10
    q, k, v = array(T + cached, heads, d), array(T + cached, kv_heads, d), array(T + cached, kv_heads, d)
    layer = CachedMultiHeadAttention(heads, d, use_bias=False, num_kv_heads=kv_heads)
    query, key, value = (x.reshape(1, T + cached, -1) for x in (q, k, v))
    layer.build(query.shape, value.shape, key.shape)
    for kernel in layer.weights:
        width = heads * d if kernel.shape[0] in (heads, heads * d) else kv_heads * d
        kernel.assign(np.eye(width).reshape(kernel.shape))
    whole, _ = layer(query, value, key)
    close(whole[0], spec.attention(q, k, v, 0).reshape(T + cached, -1))
    _, cache = layer(query[:, :cached], value[:, :cached], key[:, :cached], cache=layer.create_cache(1, 64), step=0)
    output, _ = layer(query[:, cached:], value[:, cached:], key[:, cached:], cache=cache, step=cached)
    close(output[0], spec.attention(q[cached:], k, v, cached).reshape(T, -1))
