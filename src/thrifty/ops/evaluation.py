"""Token mixers and experts as the runtime computes them, on torch tensors.

For models of low-bit layers, evaluated without gradients in float32 on a CPU: what comes out is quantised by the next
layer, where a last bit can move a code, and a moved code a token. Elsewhere the ops of the same names are faster for
long texts, and have gradients.
"""

import numpy as np
import torch
from torch import Tensor

from thrifty import native
from thrifty.ops.dispatch import as_array
from thrifty.ops.documents import pieces

#: Most experts of a head.
MOST_CHOSEN = native.MOST_CHOSEN


def float_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b. x: [..., cols]; weight: [rows, cols]. Returns [..., rows]."""
    y = native.float_matmul(_array(x.flatten(0, -2)), _array(weight), None if bias is None else _array(bias))
    return torch.from_numpy(y).view(*x.shape[:-1], -1)


def product_key_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores [2, tokens, heads, n]. queries: [..., 2 * heads * r], halves first; keys: [heads, n, 2, r]."""
    heads, _, _, r = keys.shape
    halves = queries.reshape(-1, 2, heads, r)
    scores = [[float_matmul(halves[:, p, h], keys[h, :, p]) for h in range(heads)] for p in range(2)]
    return torch.stack([torch.stack(half, 1) for half in scores])


def dynamic_mask_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, window: int | None, documents: Tensor | None = None
) -> Tensor:
    """`thrifty.ops.dynamic_mask_attention` of T = S queries, or, over keys in the order of their slots, of one."""
    qs, ks, vs, bs = (_array(t.transpose(1, 2)) for t in (q, k, v, scores))
    y = np.empty_like(qs)
    for row, at in pieces(documents, len(q)):
        # Of one query the cache has made the choice.
        every = window is None or window >= len(ks[row, at]) or len(qs[row, at]) == 1
        one = qs[row, at], ks[row, at], vs[row, at], bs[row, at]
        y[row, at] = native.dynamic_mask_attention(*one, None if every else window)
    return torch.from_numpy(y).transpose(1, 2)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`thrifty.ops.ssd` without D, dt before its softplus (-inf leaves the state untouched)."""
    xs, dts, rate, Bs, Cs = (_array(t) for t in (x, dt, A, B, C))
    states: list[np.ndarray | None] = [None] * len(x) if state is None else list(_array(state))
    y = np.empty_like(xs)
    for row, at in pieces(documents, len(x)):
        h = None if at.start else states[row]
        y[row, at], states[row] = native.ssd(xs[row, at], dts[row, at], rate, Bs[row, at], Cs[row, at], h)
    return torch.from_numpy(y), torch.from_numpy(np.stack(states))  # pyright: ignore[reportCallIssue,reportArgumentType]


def routed_experts(x: Tensor, scores: Tensor, down: Tensor, up: Tensor, k: int, act: str, norm: bool) -> Tensor:
    """sum_s w_s act(x . d_s) u_s over each head's k best, w the softmax of their sums, over all heads' sum with norm.

    x: [..., d]; scores: [2, tokens, heads, n]; down, up: [n * n, d]; k: at most MOST_CHOSEN. Returns [..., d].
    """
    tables = _array(down), _array(up)
    y = native.routed_experts(_array(x.flatten(0, -2)), _array(scores.transpose(0, 1)), *tables, k, act, norm)
    return torch.from_numpy(y).view(x.shape)


def _array(x: Tensor) -> np.ndarray:
    return as_array(x.float())
