import subprocess
import sys

import numpy as np
import pytest
import torch

from thrifty import ops, spec
from thrifty.errors import ThriftyError

SHAPES = [(2, 70, 70), (1, 300, 300), (2, 40, 200), (1, 1, 150)]


def case(
    B: int, T: int, S: int, score_heads: int = 2, d: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves q, k, v, scores with 4 heads and 2 kv heads."""
    torch.manual_seed(B + T + S)
    q, k, v = torch.randn(B, 4, T, d), torch.randn(B, 2, S, d), torch.randn(B, 2, S, d)
    scores = torch.randn(B, score_heads, S)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), scores.requires_grad_()


def formula(q, k, v, scores, window, mask=None):
    """The same in float64 with a matrix of all pairs, for gradients."""
    q, k, v, scores = (t.double() for t in (q, k, v, scores))
    (B, heads, T, d), S = q.shape, k.shape[2]
    groups = heads // scores.shape[1]
    hidden = torch.zeros(B, S, dtype=torch.bool) if mask is None else ~mask
    ends = ops.kept_until(scores.float(), S if window is None else window, ~hidden).repeat_interleave(groups, 1)
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    t, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    active = (j <= t) & (t < ends[:, :, None])
    logits = q @ k.transpose(2, 3) * d**-0.5 + scores.repeat_interleave(groups, 1)[:, :, None]
    p = torch.softmax(logits.masked_fill(~active, -1e300), -1) * active
    return p @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 3, 64, None])
@pytest.mark.parametrize("score_heads", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_the_formula(shape, window, score_heads, padded):
    B, T, S = shape
    leaves = case(B, T, S, score_heads)
    mask = (torch.arange(shape[2]) >= 30).expand(shape[0], -1) if padded else None
    y, expected = (
        ops.dynamic_mask_attention(*leaves, window=window, mask=mask),
        formula(*leaves, window=window, mask=mask),
    )
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    g = torch.randn(y.shape)
    for got, want in zip(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g.double()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [1, 20, 300, None])
@pytest.mark.parametrize("score_heads", [2, 4])
def test_documents_compete_among_themselves(window, score_heads):
    """A row of documents, some longer than a block of queries, gives what each gives alone, gradients too."""
    lengths = (1, 200, 40, 6, 53)
    q, k, v, scores = case(1, 300, 300, score_heads)
    # What lies before is better than all that comes later.
    leaves = q, k, v, (scores - torch.arange(300) / 10).detach().requires_grad_()
    documents = torch.repeat_interleave(torch.tensor([3, 0, 1, 5, 2]), torch.tensor(lengths))[None]
    y = ops.dynamic_mask_attention(*leaves, window=window, documents=documents)
    pieces = zip(*(t.split(lengths, 2) for t in leaves), strict=True)
    alone = [ops.dynamic_mask_attention(*one, window=window) for one in pieces]
    expected = torch.cat(alone, 2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    g = torch.randn(y.shape)
    for got, want in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_documents_need_every_query_and_no_mask():
    q, k, v, scores = case(1, 40, 200)
    documents = torch.zeros(1, 200, dtype=torch.long)
    with pytest.raises(ThriftyError, match=r"documents must be \[B, S\] = \(1, 200\) of T = S tokens without a mask"):
        ops.dynamic_mask_attention(q, k, v, scores, 5, documents=documents)
    mask = torch.ones(1, 200, dtype=torch.bool)
    with pytest.raises(ThriftyError, match="200 queries and a mask"):
        ops.dynamic_mask_attention(case(1, 200, 200)[0], k, v, scores, 5, mask, documents=documents)


@pytest.mark.parametrize("window", [40, None])
def test_scores_far_apart(window):
    q, k, v, scores = case(1, 300, 300)
    leaves = q, k, v, (100 * scores).detach().requires_grad_()
    y, expected = ops.dynamic_mask_attention(*leaves, window=window), formula(*leaves, window=window)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [5, 64, None])
@pytest.mark.parametrize("T", [63, 257])
def test_no_future_is_seen(window, T):
    q, k, v, scores = (t.detach() for t in case(1, T, T))
    y = ops.dynamic_mask_attention(q, k, v, scores, window)
    for t in (1, T // 2, T - 1):
        there = torch.arange(T) == t
        q2, k2, v2 = (x + 3 * there[:, None] for x in (q, k, v))
        moved = ops.dynamic_mask_attention(q2, k2, v2, scores + 3 * there, window)
        assert torch.equal(moved[:, :, :t], y[:, :, :t])
        assert not torch.equal(moved[:, :, t], y[:, :, t])


def test_gradients_see_no_future():
    leaves = case(1, 200, 200)
    y = ops.dynamic_mask_attention(*leaves, 7)
    for grad in torch.autograd.grad(y[:, :, 90].sum(), leaves[1:]):
        assert grad[:, :, :91].any()
        assert not grad[:, :, 91:].any()


@pytest.mark.parametrize("window", [40, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_scores(dtype, window):
    q, k, v, scores = (t.detach() for t in case(1, 120, 120))
    # A half cannot tell these scores apart, but softmax can.
    q, k, v, scores = q.to(dtype), k.to(dtype), v.to(dtype), 200 + scores / 2
    y = ops.dynamic_mask_attention(q, k, v, scores, window)
    assert y.dtype == dtype
    expected = formula(q, k, v, scores, window)
    tolerance = 2 * spec.TOLERANCES[str(dtype).removeprefix("torch.")] * expected.abs().max().item()
    np.testing.assert_allclose(y.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [20, None])
def test_autocast_computes_in_its_dtype(window):
    leaves = case(1, 100, 100)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.dynamic_mask_attention(*leaves, window=window)
    q, k, v, scores = leaves
    assert torch.equal(y, ops.dynamic_mask_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scores, window))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.float().sum(), leaves))


def test_dropout_is_drawn_once_for_forward_and_backward():
    q, k, v, scores = case(2, 300, 300)
    v = torch.ones_like(v, requires_grad=True)
    torch.manual_seed(0)
    y = ops.dynamic_mask_attention(q, k, v, scores, 50, dropout=0.4)
    assert y.std() > 0.05
    np.testing.assert_allclose(y.mean().item(), 1, atol=0.02)
    # y is linear in v, whatever was dropped: its gradient gives y back.
    (grad,) = torch.autograd.grad(y.sum(), v, retain_graph=True)
    torch.testing.assert_close((grad * v).sum(), y.sum(), rtol=1e-4, atol=1e-4)
    step = 1e-2
    torch.manual_seed(0)
    moved = ops.dynamic_mask_attention(q + step * q.detach().sign(), k, v * k, scores, 50, dropout=0.4)
    torch.manual_seed(0)
    base = ops.dynamic_mask_attention(q, k, v * k, scores, 50, dropout=0.4)
    (slope,) = torch.autograd.grad(base.sum(), q)
    np.testing.assert_allclose((moved - base).sum().item() / step, (slope * q.sign()).sum().item(), rtol=0.05)


def test_batches_too_large_for_one_turn(monkeypatch):
    leaves = case(3, 150, 150)
    y = ops.dynamic_mask_attention(*leaves, window=20)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    monkeypatch.setattr(sys.modules["thrifty.ops.dynamic_mask_attention"], "_LOGITS", 1)
    split = ops.dynamic_mask_attention(*leaves, window=20)
    torch.testing.assert_close(split, y, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(split.square().sum(), leaves), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_memory_does_not_hold_all_pairs():
    """40 000 tokens: the pairs of one head are 6.4 GB of floats; the inputs and what is made of them, some 0.1 GB."""
    code = (
        "import torch, resource; from thrifty import ops\n"
        "q, k, v = (torch.randn(1, h, 40_000, 16, requires_grad=True) for h in (4, 2, 2))\n"
        "b = torch.randn(1, 2, 40_000, requires_grad=True)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ops.dynamic_mask_attention(q, k, v, b, 32).sum().backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(used) * unit < 300e6


def test_torch_accepts_the_ops():
    q, k, v, scores = case(1, 80, 80)
    ends = ops.kept_until(scores, 5)
    torch.library.opcheck(torch.ops.thrifty.kept_until, (scores.detach(), 5))
    torch.library.opcheck(torch.ops.thrifty.dynamic_mask_attention, (q, k, v, scores, ends, 5, 0.0, 0))


def test_equal_values_tie_however_many_are_scored_at_once():
    torch.manual_seed(0)
    v = torch.randn(1, 2, 1, 40).expand(1, 2, 517, 40)
    A, weight = torch.randn(3), torch.randn(3, 80)
    scores = ops.key_scores(v, A, weight)
    for n in (1, 5, 64, 517):
        assert torch.equal(ops.key_scores(v[:, :, :n], A, weight), scores[:, :, :1].expand(-1, -1, n))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be at least 1; got 0; None keeps every key"),
        ({"k": torch.ones(1, 3, 9, 8)}, "heads a multiple of kv_heads"),
        ({"scores": torch.ones(1, 3, 9)}, "score_heads 2 or 4; got"),
        ({"mask": torch.ones(1, 9)}, "mask must be bool"),
        ({"mask": torch.ones(1, 8, dtype=torch.bool)}, "mask must be bool"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"q": torch.ones(1, 4, 9, 8), "k": torch.ones(1, 2, 9, 8), "v": torch.ones(1, 2, 9, 8)}
    good |= {"scores": torch.ones(1, 2, 9), "window": 3}
    with pytest.raises(ThriftyError, match=message):
        ops.dynamic_mask_attention(**good | change)
