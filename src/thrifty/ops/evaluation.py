"""Token mixers and experts as the runtime computes them, on torch tensors.

For models of low-bit layers, evaluated without gradients in float32 on a CPU: what comes out is quantised by the next
layer, where a last bit can move a code, and a moved code a token. Elsewhere the ops of the same names are faster for
long texts, and have gradients.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from thrifty import native

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


def dynamic_mask_attention(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, window: int | None) -> Tensor:
    """`thrifty.ops.dynamic_mask_attention` of T = S queries, or, over keys in the order of their slots, of one."""
    T, S = q.shape[2], k.shape[2]
    if T == 1 or (window is not None and window >= S):
        # Of one query the cache has made the choice.
        window = None
    rows = zip(*(_array(t.transpose(1, 2)) for t in (q, k, v, scores)), strict=True)
    y = [native.dynamic_mask_attention(q, k, v, scores, window) for q, k, v, scores in rows]
    return _stack(y).transpose(1, 2)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`thrifty.ops.ssd` without D, dt before its softplus (-inf leaves the state untouched)."""
    rows = zip(*(_array(t) for t in (x, dt, B, C)), strict=True)
    states: Sequence[np.ndarray | None] = [None] * len(x) if state is None else list(_array(state))
    found = [native.ssd(x, dt, _array(A), B, C, h) for (x, dt, B, C), h in zip(rows, states, strict=True)]
    return _stack([y for y, _ in found]), _stack([h for _, h in found])


def routed_experts(x: Tensor, scores: Tensor, down: Tensor, up: Tensor, k: int, act: str, norm: bool) -> Tensor:
    """sum_s w_s act(x . d_s) u_s over each head's k best, w the softmax of their sums, over all heads' sum with norm.

    x: [..., d]; scores: [2, tokens, heads, n]; down, up: [n * n, d]; k: at most MOST_CHOSEN. Returns [..., d].
    """
    tables = _array(down), _array(up)
    y = native.routed_experts(_array(x.flatten(0, -2)), _array(scores.transpose(0, 1)), *tables, k, act, norm)
    return torch.from_numpy(y).view(x.shape)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().float().contiguous().numpy()


def _stack(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.stack([torch.from_numpy(row) for row in rows])
