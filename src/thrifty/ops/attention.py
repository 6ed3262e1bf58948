"""Causal softmax attention with grouped heads."""

import torch
from torch import Tensor
from torch.nn import functional as F

from thrifty import native
from thrifty.ops.dispatch import is_evaluation
from thrifty.ops.documents import pieces, visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    documents: Tensor | None = None,
) -> Tensor:
    """o_t = softmax(q_t K^T / sqrt(d)) V over the keys up to t (arXiv 1706.03762, eq. 1).

    q: [B, heads, T, d]; k, v: [B, kv_heads, S, d]; query head h reads kv head h // (heads / kv_heads).
    mask: [B, 1, T, S], boolean (True is seen) or additive; without one the T queries are the first T positions, or,
    where T = 1, the last one. documents: int [B, T] instead of a mask, the document that each of T = S tokens belongs
    to: a query sees its own only. Returns [B, heads, T, d]. Evaluated without gradients in float32 on a CPU, causal and
    without padding, it gives the bits of the runtime: what follows is quantised, where a last bit can move a code.
    """
    T, S = q.shape[2], k.shape[2]
    if dropout == 0 and is_evaluation(q) and (T in (1, S) if mask is None else _is_causal(mask, T, S)):
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        y = q.new_empty(q.shape)
        for row, at in pieces(documents, len(q)):
            q_row, k_row, v_row = (t[row, at].numpy() for t in (q, k, v))
            y[row, at] = torch.from_numpy(native.attention(q_row, k_row, v_row, S - T))
        return y.transpose(1, 2)
    if documents is not None:
        mask = visible(documents)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and T > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _is_causal(mask: Tensor, T: int, S: int) -> bool:
    """Whether a boolean mask [B, 1, T, S] hides the future and nothing else."""
    if mask.dtype != torch.bool or S < T:
        return False
    return bool((mask == torch.ones(T, S, dtype=torch.bool).tril(S - T)).all())
