"""What the runtime computes on torch tensors: near the ops of training, and the same bits however a text is cut."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Cache

from thrifty import native, nn, ops
from thrifty.errors import ThriftyError
from thrifty.ops import evaluation

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 63), (33, 257)])
def test_float_matmul(rows, cols):
    x, weight, bias = torch.randn(2, 5, cols), torch.randn(rows, cols), torch.randn(rows)
    for b in (None, bias):
        torch.testing.assert_close(evaluation.float_matmul(x, weight, b), F.linear(x, weight, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score_heads", [2, 4])
@pytest.mark.parametrize("window", [1, 7, 20, 90, None])
def test_dynamic_mask_attention(window, score_heads):
    q, k, v = torch.randn(2, 4, 70, 18), torch.randn(2, 2, 70, 18), torch.randn(2, 2, 70, 18)
    scores = torch.randint(0, 9, (2, score_heads, 70)) / 3
    y = evaluation.dynamic_mask_attention(q, k, v, scores, window)
    torch.testing.assert_close(y, ops.dynamic_mask_attention(q, k, v, scores, window), rtol=1e-4, atol=1e-5)


def test_ssd():
    x, dt, A = torch.randn(2, 9, 4, 18), torch.randn(2, 9, 4), -torch.rand(4)
    B, C, state = torch.randn(2, 9, 2, 5), torch.randn(2, 9, 2, 5), torch.randn(2, 4, 18, 5)
    dt[:, 3] = -torch.inf
    for start in (None, state):
        y, end = evaluation.ssd(x, dt, A, B, C, start)
        expected, expected_end = ops.ssd(x, F.softplus(dt), A, B, C, None, start)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(end, expected_end, rtol=1e-4, atol=1e-5)
    untouched = torch.full((2, 1, 4), -torch.inf)
    assert torch.equal(evaluation.ssd(x[:, :1], untouched, A, B[:, :1], C[:, :1], state)[1], state)


@pytest.mark.parametrize("options", [{"router": "linear"}, {"n_experts_heads": 3, "norm_topk_prob": True}])
def test_experts(options):
    layer = nn.CDMoE(18, "gelu", 8, 6, 49, n_experts_per_head=5, **options)
    x = torch.randn(2, 7, 18)
    scores, tables = layer.router_scores(x), (layer.down_embed.weight, layer.up_embed.weight)
    y = evaluation.routed_experts(x, scores, *tables, 5, "gelu", layer.norm_topk_prob)
    torch.testing.assert_close(y, layer.experts(x, scores), rtol=1e-4, atol=1e-5)
    if layer.router == "product_key_heads":
        exact = evaluation.product_key_scores(layer.queries(x), layer.keys)
        torch.testing.assert_close(exact, scores, rtol=1e-4, atol=1e-5)


def test_arrays_that_do_not_fit_are_refused():
    x = torch.randn(1, 4, 2, 6)
    with pytest.raises(ThriftyError, match=r"\[float_matmul\] x and weight must be"):
        evaluation.float_matmul(torch.randn(2, 3), torch.randn(4, 5))
    with pytest.raises(ThriftyError, match=r"\[dynamic_mask_attention\] q, k, v and scores must fit"):
        evaluation.dynamic_mask_attention(x, x, x, torch.randn(1, 3, 2), None)
    with pytest.raises(ThriftyError, match=r"\[ssd\] x, dt, A, B, C must fit"):
        evaluation.ssd(x, torch.randn(1, 4, 3), torch.randn(2), x, x, None)
    with pytest.raises(ThriftyError, match=r"\[routed_experts\] x, scores and tables must fit"):
        evaluation.routed_experts(
            torch.randn(3, 6), torch.randn(2, 3, 1, 4), torch.randn(9, 6), torch.randn(9, 6), 2, "silu", False
        )


LAYERS = {
    "dynamic mask": lambda: nn.DynamicMaskAttention(48, 6, 2, window=9, qk_norm=True, weight="ternary"),
    "every key": lambda: nn.DynamicMaskAttention(48, 6, 2, selection="none", dt_heads="attention", weight="ternary"),
    "ssd": lambda: nn.SSD(48, 6, skip=False, weight="ternary"),
    "mlgru": lambda: nn.MLGRU(48),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("prompt", [1, 5, 9, 10, 37])
def test_a_low_bit_mixer_gives_the_same_bits_however_a_text_is_cut(name, prompt):
    layer = LAYERS[name]().eval()
    if isinstance(layer, nn.DynamicMaskAttention):
        layer.A.uniform_(-2, -0.2)
    kind = nn.DynamicMaskLayer if isinstance(layer, nn.DynamicMaskAttention) else nn.RecurrentLayer
    cache = Cache(layers=[kind()])
    x = torch.randn(2, 60, 48)
    x[:, 20:24] = x[:, 4:8]  # keys that tie
    parts = [layer(part, None, None, cache) for part in x.split([prompt, *[1] * (60 - prompt)], 1)]
    assert torch.equal(torch.cat(parts, 1), layer(x))
