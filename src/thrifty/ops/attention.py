"""Causal softmax attention with grouped heads."""

from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """o_t = softmax(q_t K^T / sqrt(d)) V over the keys up to t (arXiv 1706.03762, eq. 1).

    q: [B, heads, T, d]; k, v: [B, kv_heads, S, d]; query head h reads kv head h // (heads / kv_heads).
    mask: [B, 1, T, S], boolean (True is seen) or additive; without one the T queries are the first T positions, or,
    where T = 1, the last one. Returns [B, heads, T, d].
    """
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )
