"""Retrieval by product keys, and experts of one hidden unit each."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thrifty import native, spec
from thrifty.errors import ThriftyError
from thrifty.ops.dispatch import as_array, use_native
from thrifty.ops.glu import activation

#: Elements gathered, or summed in pairs, at once where there is no kernel that gathers nothing.
CHUNK = 1 << 22
#: All experts are multiplied, and the chosen picked, where there are at most so many for each that a token chooses and
#: so many tokens: products of whole tables then take less time than rows from here and there
#: (docs/ops/product_key_experts.md).
DENSE_EXPERTS_PER_CHOICE = 8
DENSE_TOKENS = 16

_NATIVE_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

_aten = torch.ops.aten
#: grad * act'(h) by the activation's name.
_SLOPES = {
    "sigmoid": lambda grad, h: _aten.sigmoid_backward(grad, torch.sigmoid(h)),
    "silu": lambda grad, h: _aten.silu_backward(grad, h),
    "gelu": lambda grad, h: _aten.gelu_backward(grad, h),
    "gelu_pytorch_tanh": lambda grad, h: _aten.gelu_backward(grad, h, approximate="tanh"),
    "relu": lambda grad, h: grad * (h > 0),
    "relu2": lambda grad, h: grad * 2 * F.relu(h),
}


def product_key_topk(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of all sums s_{i n + j} = x_i + y_j, best first (product keys, arXiv 1907.05242, section 3.1).

    x, y: [..., n], k <= n^2, taken in float32. Returns sums [..., k] and expert numbers i n + j, int64 [..., k]. Of
    equal sums the expert with the smaller number comes first. About k ln k pairs are looked at: (i + 1)(j + 1) <= k by
    the ranks i, j of each side. Differentiable in x and y. Raises ThriftyError where k does not fit.
    """
    if x.shape != y.shape or x.shape[-1] == 0:
        raise ThriftyError(
            f"[product_key_topk] x and y must have one shape [..., n]; got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if not 1 <= k <= x.shape[-1] ** 2:
        raise ThriftyError(
            f"[product_key_topk] k must be 1 to n^2 = {x.shape[-1] ** 2}; got {k}; choose fewer, or give more keys"
        )
    return _topk(x, y, k)


def product_key_experts(
    x: Tensor, indices: Tensor, weights: Tensor, down: Tensor, up: Tensor, act: str, sparse_grad: bool = False
) -> Tensor:
    """y = sum_k w_k act(x . d_k) u_k over experts of one hidden unit each (PEER, arXiv 2407.04153, eq. 3).

    x: [N, d]; indices: int64 [N, k]; weights: [N, k]; down, up: [E, d]; act: a key of `ACTIVATIONS`. Returns [N, d] in
    the dtype of x, summed in float32. No tensor of N k d elements is made, forward or backward; kept for the backward
    are x, indices, weights and the hidden values [N, k]. Gradients of down and up are computed for the experts
    touched: as rows of zeros elsewhere, or, with sparse_grad, as sparse tensors of these rows alone.
    Raises ThriftyError for shapes that do not fit, and where a number is not an expert's (on a CPU).
    """
    activation(act)
    fits = x.ndim == 2 and indices.shape == weights.shape and indices.shape[:-1] == x.shape[:1]
    if not fits or down.shape != up.shape or down.shape[1:] != x.shape[1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, indices, weights, down, up))
        raise ThriftyError(
            "[product_key_experts] x, indices, weights, down, up must be [N, d], [N, k], [N, k], [E, d], [E, d]; "
            f"got {shapes}"
        )
    few = down.shape[0] <= DENSE_EXPERTS_PER_CHOICE * indices.shape[1] and x.shape[0] >= DENSE_TOKENS
    if few and not sparse_grad:
        return _all_experts(x, indices, weights, down, up, act)
    return _experts(x, indices, weights, down, up, act, sparse_grad)[0]


@torch.library.custom_op("thrifty::product_key_topk", mutates_args=())
def _topk(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape, n = (*x.shape[:-1], k), x.shape[-1]
    x, y = (t.detach().reshape(-1, n).to(_sum_dtype(t)) for t in (x, y))
    if use_native(x) and x.dtype == torch.float32:
        x, y = (t if t.stride(1) == 1 or n == 1 else t.contiguous() for t in (x, y))
        sums, indices = (torch.from_numpy(a) for a in native.product_key_topk(x.numpy(), y.numpy(), k))
    else:
        sums, indices = _topk_text(x, y, k)
    return sums.view(shape), indices.view(shape)


@_topk.register_fake
def _(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=_sum_dtype(x)), x.new_empty(shape, dtype=torch.int64)


def _topk_setup(ctx, inputs, output) -> None:
    x, _, _ = inputs
    ctx.n, ctx.dtype = x.shape[-1], x.dtype
    ctx.save_for_backward(output[1])


def _topk_backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
    (indices,) = ctx.saved_tensors
    zeros = grad.new_zeros(*grad.shape[:-1], ctx.n)
    sides = (indices // ctx.n, indices % ctx.n)
    grad_x, grad_y = (zeros.scatter_add(-1, side, grad).to(ctx.dtype) for side in sides)
    return grad_x, grad_y, None


_topk.register_autograd(_topk_backward, setup_context=_topk_setup)


def _topk_text(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    # Stable: of equal scores the smaller index comes first.
    (sx, ix), (sy, iy) = (t.sort(dim=-1, descending=True, stable=True) for t in (x, y))
    i, j = (torch.from_numpy(side).to(x.device) for side in _staircase(k, n))
    sums, numbers = sx[:, i] + sy[:, j], ix[:, i] * n + iy[:, j]
    numbers, order = numbers.sort(dim=-1)
    sums, order = sums.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    sums, numbers = sums[:, :k], numbers.gather(-1, order)[:, :k]
    # Sums are rounded, so one just outside of the staircase may equal the last chosen, with a smaller number.
    i = torch.arange(min(k + 1, n), device=x.device)
    j = k // (i + 1)
    i, j = i[j < n], j[j < n]
    if len(i):
        tied = ((sx[:, i] + sy[:, j]).amax(-1) >= sums[:, -1]).nonzero()[:, 0]
        for rows in tied.split(max(1, CHUNK // n**2)):
            pairs = (x[rows, :, None] + y[rows, None, :]).flatten(1).sort(dim=-1, descending=True, stable=True)
            sums[rows], numbers[rows] = (t[:, :k] for t in pairs)
    return sums.contiguous(), numbers.contiguous()


@cache
def _staircase(k: int, n: int):
    return spec.staircase(k, n)


@torch.library.custom_op("thrifty::product_key_experts", mutates_args=())
def _experts(
    x: Tensor, indices: Tensor, weights: Tensor, down: Tensor, up: Tensor, act: str, sparse_grad: bool
) -> tuple[Tensor, Tensor]:
    rows, weights = (t.detach().to(_sum_dtype(x)).contiguous() for t in (x, weights))
    indices, down, up = indices.contiguous(), down.detach(), up.detach()
    if _is_native(rows, down):
        hidden, y = _call_native(rows, indices, weights, down, up, act)
    else:
        hidden = _dots(rows, indices, down)
        y = _sums(indices, activation(act)(hidden) * weights, up)
    return y.to(x.dtype), hidden


@_experts.register_fake
def _(
    x: Tensor, indices: Tensor, weights: Tensor, down: Tensor, up: Tensor, act: str, sparse_grad: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(indices.shape, dtype=_sum_dtype(x))


def _experts_setup(ctx, inputs, output) -> None:
    x, indices, weights, down, up, ctx.act, ctx.sparse = inputs
    ctx.save_for_backward(x, indices, weights, down, up, output[1])


def _experts_backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    if not ctx.sparse:
        grad_x, grad_weights, *tables = _dense_backward(grad, *ctx.saved_tensors, ctx.act)  # pyright: ignore
    else:
        grad_x, grad_weights, experts, *rows = _backward(grad, *ctx.saved_tensors, ctx.act)  # pyright: ignore
        shape = ctx.saved_tensors[3].shape
        tables = [
            torch.sparse_coo_tensor(experts[None], r, shape, is_coalesced=True, check_invariants=False) for r in rows
        ]
    return grad_x, None, grad_weights, *tables, None, None


_experts.register_autograd(_experts_backward, setup_context=_experts_setup)


@torch.library.custom_op("thrifty::product_key_experts_backward", mutates_args=())
def _dense_backward(
    grad: Tensor, x: Tensor, indices: Tensor, weights: Tensor, down: Tensor, up: Tensor, hidden: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_weights, experts, *rows = _backward(grad, x, indices, weights, down, up, hidden, act)
    grad_down, grad_up = (torch.zeros_like(t).index_copy_(0, experts, r) for t, r in zip((down, up), rows, strict=True))
    return grad_x, grad_weights, grad_down, grad_up


@_dense_backward.register_fake
def _(
    grad: Tensor, x: Tensor, indices: Tensor, weights: Tensor, down: Tensor, up: Tensor, hidden: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(down), torch.empty_like(up)


def _backward(
    grad: Tensor, x: Tensor, indices: Tensor, weights: Tensor, down: Tensor, up: Tensor, hidden: Tensor, act: str
) -> tuple[Tensor, ...]:
    """Gradients of x and weights, the experts touched [U], and their rows [U, d] of the gradients of down and up."""
    g, rows, w = (t.to(hidden.dtype).contiguous() for t in (grad, x, weights))
    indices = indices.contiguous()
    activated, reached = activation(act)(hidden), _dots(g, indices, up)
    grad_hidden = _SLOPES[act](w * reached, hidden)
    grad_x = _sums(indices, grad_hidden, down)
    # Pairs of a token and an expert in the order of experts: each gradient row is then a sum over one stretch of them,
    # in the order of tokens, and nothing is added in place.
    experts, order = indices.flatten().sort(stable=True)
    experts, counts = experts.unique_consecutive(return_counts=True)
    tokens, starts = order // indices.shape[1], counts.cumsum(0) - counts
    grad_down, grad_up = (
        F.embedding_bag(tokens, source, starts, mode="sum", per_sample_weights=pairs.flatten()[order]).to(down.dtype)
        for source, pairs in ((rows, grad_hidden), (g, w * activated))
    )
    return grad_x.to(x.dtype), (activated * reached).to(weights.dtype), experts, grad_down, grad_up


def _dots(x: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """x . t_k, [N, k]."""
    if _is_native(x, table):
        return _call_native(x, indices, None, table, None)[0]
    per_chunk = max(1, CHUNK // (indices.shape[1] * table.shape[1]))
    chunks = zip(x.split(per_chunk), indices.split(per_chunk), strict=True)
    parts = [(F.embedding(i, table).to(x.dtype) @ rows[:, :, None])[..., 0] for rows, i in chunks]
    return torch.cat(parts) if parts else x.new_empty(indices.shape)


def _sums(indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """sum_k w_k t_k, [N, d]."""
    if _is_native(weights, table):
        return _call_native(None, indices, weights, None, table)[1]
    y = F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights.to(table.dtype))
    return y.to(weights.dtype)


def _all_experts(x: Tensor, indices: Tensor, weights: Tensor, down: Tensor, up: Tensor, act: str) -> Tensor:
    hidden = (x @ down.T.to(x.dtype)).gather(-1, indices)
    pairs = (activation(act)(hidden) * weights).to(x.dtype)
    mixture = x.new_zeros(x.shape[0], down.shape[0]).scatter_add(-1, indices, pairs.to(x.dtype))
    return (mixture @ up.to(x.dtype)).to(x.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _is_native(x: Tensor, table: Tensor) -> bool:
    return use_native(x) and x.dtype == torch.float32 and table.dtype in _NATIVE_DTYPES and table.is_contiguous()


def _call_native(
    x: Tensor | None, indices: Tensor, weights: Tensor | None, down, up, act: str = "relu"
) -> tuple[Any, Any]:
    """native.product_key_experts over tensors: (hidden, y)."""
    dtype = (up if down is None else down).dtype
    arrays = [None if t is None else as_array(t) for t in (x, indices, weights)]
    # numpy has no bfloat16: 16-bit tables go as their bits.
    tables = [None if t is None else (t if t.dtype == torch.float32 else t.view(torch.int16)) for t in (down, up)]
    tables = [None if t is None else as_array(t) for t in tables]
    hidden, y = native.product_key_experts(*arrays, *tables, act, _NATIVE_DTYPES[dtype])  # pyright: ignore
    return None if hidden is None else torch.from_numpy(hidden), None if y is None else torch.from_numpy(y)
