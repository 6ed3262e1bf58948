from typing import Any

from torch import Tensor, nn

from thrifty import ops
from thrifty.errors import ThriftyError
from thrifty.nn.cache import packed
from thrifty.nn.linear import Linear, Norm, make_linear
from thrifty.nn.norm import RMSNorm


class BitAttention(nn.Module):
    """y = o(norm(softmax(q k^T / sqrt(head_dim)) v)), causal, q, k, v, o low-bit projections (arXiv 2402.17764).

    x: [B, T, dim] -> [B, T, dim]. Query head h reads kv head h // (heads / kv_heads). sub_norm puts an RMSNorm with
    gain (BitNet's `attn_sub_norm`) before `o`, qk_norm one on each head of q and k (Qwen3's `q_norm`, `k_norm`).
    out_bias: whether `o` has a bias, by default as the others. weight, norm: as for `BitFeedForward`.

    forward(x, rotary, mask, past_key_values): rotary is the pair (cos, sin) of the tokens' positions, from
    `RotaryEmbedding`, or None for no positions; mask is [B, 1, T, S], boolean or additive, needed for padding, or for
    several tokens after cached ones, or int64 [B, T], the document of each token, which sees no other; past_key_values
    is a transformers `Cache`, updated at `layer_idx`.
    Raises ThriftyError where heads and widths do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        sub_norm: bool = False,
        weight: Linear = "ternary",
        norm: Norm = "rms",
        eps: float = 1e-5,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(dim, heads, kv_heads, head_dim)
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.attention_dropout = dropout
        self.layer_idx = layer_idx
        self.q_proj = make_linear(weight, dim, heads * self.head_dim, bias, norm)
        self.k_proj = make_linear(weight, dim, kv_heads * self.head_dim, bias, norm)
        self.v_proj = make_linear(weight, dim, kv_heads * self.head_dim, bias, norm)
        self.q_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.attn_sub_norm = RMSNorm(heads * self.head_dim, eps) if sub_norm else None
        out_bias = bias if out_bias is None else out_bias
        self.o_proj = make_linear(weight, heads * self.head_dim, dim, out_bias, norm)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))  # [B, T, h, d]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = ops.apply_rope(q, *rotary), ops.apply_rope(k, *rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, h, T, d]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        documents = packed(mask, past_key_values)
        dropout = self.attention_dropout if self.training else 0.0
        y = ops.attention(q, k, v, None if documents is not None else mask, dropout, documents)
        y = y.transpose(1, 2).flatten(2)  # [B, T, heads * d]
        if self.attn_sub_norm is not None:
            y = self.attn_sub_norm(y)
        return self.o_proj(y)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


def check_heads(dim: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    """Raises ThriftyError where heads and widths do not divide."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ThriftyError(
            f"[attention] query heads must be a multiple of kv heads; got {heads} and {kv_heads}; choose kv heads that "
            f"divide {heads}"
        )
    if head_dim is None and dim % heads:
        raise ThriftyError(
            f"[attention] width {dim} is not a multiple of {heads} heads; choose heads that divide it, or give head_dim"
        )
    head_dim = dim // heads if head_dim is None else head_dim
    if head_dim < 2 or head_dim % 2:
        raise ThriftyError(f"[attention] head_dim must be even, for rotary positions; got {head_dim}; change the heads")
