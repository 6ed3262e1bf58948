"""Every torch op and module against the spec, on the same arrays."""

import numpy as np
import pytest
import torch

from thrifty import nn, ops, spec

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    tolerance = spec.TOLERANCES["float32"] * np.abs(expected).max()
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("act", sorted(spec.ACTIVATIONS))
def test_glu(act):
    gate, up = array(5, 63), array(5, 63)
    close(ops.glu(torch.from_numpy(gate), torch.from_numpy(up), act), spec.glu(gate, up, act))
    assert set(ops.ACTIVATIONS) == set(spec.ACTIVATIONS)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize(("T", "cached"), [(1, 0), (7, 0), (1, 300), (5, 300)])
def test_attention(heads, kv_heads, T, cached):
    S = T + cached
    q, k, v = array(T, heads, 10), array(S, kv_heads, 10), array(S, kv_heads, 10)
    tensors = (torch.from_numpy(a).transpose(0, 1)[None] for a in (q, k, v))
    seen = torch.arange(S) <= torch.arange(cached, S)[:, None]
    y = ops.attention(*tensors, mask=seen[None, None] if cached and T > 1 else None)
    close(y[0].transpose(0, 1), spec.attention(q, k, v, cached))


def test_rope():
    positions = np.array([0, 1, 5, 63])
    x = array(4, 3, 16)
    rotary = nn.RotaryEmbedding(16, 64, theta=500_000.0)
    cos, sin = rotary(torch.from_numpy(positions))
    expected = spec.rope_tables(positions, 16, 500_000.0)
    assert np.array_equal(cos.numpy(), expected[0])
    assert np.array_equal(sin.numpy(), expected[1])
    close(ops.apply_rope(torch.from_numpy(x), cos, sin), spec.apply_rope(x, *expected))


@pytest.mark.parametrize("kind", ["ternary", "binary"])
@pytest.mark.parametrize("norm", ["rms", None])
@pytest.mark.parametrize(("cols", "rows"), [(1, 3), (63, 257), (500, 63)])
def test_bit_linear_and_its_packed_form(kind, norm, cols, rows):
    layer = nn.BitLinear(cols, rows, weight=kind, norm=norm)
    x = array(4, cols)
    codes, scale = ops.quantize_weight(layer.weight, kind)
    x_codes, x_scales = spec.quantize_per_token(x, norm=norm == "rms")
    bias = layer.bias.detach().numpy() if layer.bias is not None else None
    expected = spec.ternary_matmul(x_codes, x_scales, codes.numpy(), scale.numpy(), bias)
    assert np.array_equal(layer(torch.from_numpy(x)).detach().numpy(), expected)
    assert np.array_equal(nn.pack(layer)(torch.from_numpy(x)).numpy(), expected)


def test_rms_norm():
    layer = nn.RMSNorm(63)
    torch.nn.init.normal_(layer.weight)
    x = array(4, 63)
    assert np.array_equal(
        layer(torch.from_numpy(x)).detach().numpy(), spec.rms_norm(x, layer.weight.detach().numpy(), 1e-5)
    )


def product(layer: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    codes, scale = ops.quantize_weight(layer.weight, layer.kind)  # pyright: ignore
    return spec.ternary_matmul(*spec.quantize_per_token(x, norm=True), codes.numpy(), scale.numpy())


@pytest.mark.parametrize("glu", [False, True])
def test_feed_forward(glu):
    layer = nn.BitFeedForward(16, hidden=24, glu=glu, activation="relu2", post_act_norm=True, bias=False)
    x = array(5, 16)
    up = product(layer.up_proj, x)
    hidden = spec.glu(product(layer.gate_proj, x), up, "relu2") if layer.gate_proj else spec.ACTIVATIONS["relu2"](up)
    expected = product(layer.down_proj, spec.rms_norm(hidden, layer.ffn_sub_norm.weight.detach().numpy()))  # pyright: ignore
    close(layer(torch.from_numpy(x)), expected)


def test_attention_block():
    layer = nn.BitAttention(16, heads=4, kv_heads=2, head_dim=8)
    x = array(6, 16)
    tables = spec.rope_tables(np.arange(6), 8, 10_000.0)
    q, k, v = (product(p, x).reshape(6, -1, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    mixed = spec.attention(spec.apply_rope(q, *tables), spec.apply_rope(k, *tables), v, 0)
    y = layer(torch.from_numpy(x)[None], tuple(torch.from_numpy(t)[None] for t in tables))
    # Attention sums floats in another order, and its result is quantised: a code may fall on the other side.
    expected = product(layer.o_proj, mixed.reshape(6, -1))
    np.testing.assert_allclose(y[0].detach().numpy(), expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def test_mlgru_block():
    layer = nn.MLGRU(16)
    x = array(6, 16)
    f, c, g = (product(p, x) + p.bias.detach().numpy() for p in (layer.f_proj, layer.c_proj, layer.g_proj))  # pyright: ignore
    mixed = spec.mlgru(1 / (1 + np.exp(-f)), spec.ACTIVATIONS["silu"](c)) / (1 + np.exp(-g))
    expected = product(layer.o_proj, mixed) + layer.o_proj.bias.detach().numpy()  # pyright: ignore
    # Gates are floats summed in another order and then quantised: a code may fall on the other side.
    y = layer(torch.from_numpy(x)[None])[0].detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def test_ssd_block():
    layer = nn.SSD(16, 4, n_groups=2, weight="ternary", norm="rms", bias=False)
    torch.nn.init.normal_(layer.D)  # pyright: ignore
    x = array(6, 16)
    tables = spec.rope_tables(np.arange(6), 4, 10_000.0)
    values, B, C = (product(p, x).reshape(6, -1, 4) for p in (layer.x_proj, layer.b_proj, layer.c_proj))
    dt = np.logaddexp(0, x @ layer.dt_proj.weight.detach().numpy().T)
    A, D = -np.exp(layer.A_log.detach().numpy()), layer.D.detach().numpy()  # pyright: ignore
    mixed, _ = spec.ssd(values, dt, A, spec.apply_rope(B, *tables), spec.apply_rope(C, *tables), D)
    expected = product(layer.o_proj, mixed.reshape(6, -1))
    y = layer(torch.from_numpy(x)[None], tuple(torch.from_numpy(t)[None] for t in tables))[0].detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("experts", [16, 400])
def test_product_key_experts(experts):
    n = round(experts**0.5)
    x, down, up = array(18, 24), array(experts, 24), array(experts, 24)
    left, right = array(18, n), array(18, n)
    sums, indices = spec.product_key_topk(left, right, 6)
    weights, chosen = ops.product_key_topk(torch.from_numpy(left), torch.from_numpy(right), 6)
    assert np.array_equal(weights.numpy(), sums)
    assert np.array_equal(chosen.numpy(), indices)
    y = ops.product_key_experts(
        torch.from_numpy(x), chosen, weights, torch.from_numpy(down), torch.from_numpy(up), "silu"
    )
    close(y, spec.product_key_experts(x, indices, sums, down, up, spec.ACTIVATIONS["silu"]))
