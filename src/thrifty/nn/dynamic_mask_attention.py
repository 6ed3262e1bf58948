import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thrifty import ops
from thrifty.errors import ThriftyError
from thrifty.nn.attention import check_heads
from thrifty.nn.cache import dynamic_mask_layer, packed, unpadded
from thrifty.nn.linear import ExactLinear, Linear, Norm, is_exact, make_linear
from thrifty.nn.norm import RMSNorm
from thrifty.nn.rotary import RotaryEmbedding
from thrifty.ops import evaluation
from thrifty.ops.documents import pieces

#: How a dynamic mask chooses its keys.
Selection = Literal["none", "keep_window", "ratio", "ratio_legacy"]
SELECTIONS = ("none", "keep_window", "ratio", "ratio_legacy")
#: What scores a key: each kv head, or each query head.
DT_HEADS = ("kv", "attention")


class DynamicMaskAttention(nn.Module):
    """y = o(norm(softmax(q k^T / sqrt(head_dim) + b) v)), causal, over the w keys whose b is greatest
    (Wonderful Matrices, arXiv 2412.11834; Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124).

    b = exp(A softplus(dt_proj v)) scores a key for every query (`thrifty.ops.key_scores`), once per kv head, or per
    query head with dt_heads="attention", which then keeps keys of its own. x: [B, T, dim] -> [B, T, dim]. qk_norm puts
    an RMSNorm with gain on each head of q and k before rotary positions; sub_norm one (BitNet's `attn_sub_norm`) before
    `o`. weight, norm: as for `BitFeedForward`; `dt_proj` is dense whatever they are.

    selection: "none" keeps every key; "keep_window" the `window` best; "ratio" the int(ratio * max_positions) best;
    "ratio_legacy", with a warning, drops what lies below the int(ratio * S)-th lowest of all S scores, later keys'
    included, as the first published code does: not causal, and dense.

    forward(x, rotary, mask, past_key_values): called as `BitAttention` is; mask is boolean [B, S], False at padding,
    which is not seen and not kept (a query without any key gives zeros before `o`; with keyless_mean the mean of all
    values, as transformers' Doge does), or int64 [B, T], the document of each token, in which a query has its keys;
    without documents keys are kept in the `DynamicMaskLayer` number `layer_idx` of past_key_values.
    Raises ThriftyError where heads and widths do not divide, and for a selection that keeps no key.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        window: int | None = None,
        selection: Selection = "keep_window",
        ratio: float = 0.0,
        max_positions: int | None = None,
        dt_heads: Literal["kv", "attention"] = "kv",
        qk_norm: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        sub_norm: bool = False,
        weight: Linear = "dense",
        norm: Norm = "rms",
        eps: float = 1e-5,
        layer_idx: int = 0,
        keyless_mean: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(dim, heads, kv_heads, head_dim)
        if dt_heads not in DT_HEADS:
            raise ThriftyError(f"[dynamic_mask] dt_heads must be one of {', '.join(DT_HEADS)}; got '{dt_heads}'")
        self.window = kept_keys(selection, window, ratio, max_positions)
        self.selection, self.ratio = selection, ratio
        if selection == "ratio_legacy":
            warnings.warn(
                "dynamic_mask_selection='ratio_legacy' chooses keys by those that come later: outputs see the future, "
                "and depend on the length of the text; 'ratio' and 'keep_window' do not",
                stacklevel=2,
            )
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.attention_dropout, self.kind = dropout, weight
        self.layer_idx = layer_idx
        self.keyless_mean = keyless_mean
        width, kv_width = heads * self.head_dim, kv_heads * self.head_dim
        score_heads = kv_heads if dt_heads == "kv" else heads
        self.q_proj = make_linear(weight, dim, width, bias, norm)
        self.k_proj = make_linear(weight, dim, kv_width, bias, norm)
        # Equal tokens have equal values, so that their scores tie, in prompts and steps alike.
        dense = weight == "dense"
        self.v_proj = ExactLinear(dim, kv_width, bias) if dense else make_linear(weight, dim, kv_width, bias, norm)
        self.A = nn.Parameter(torch.empty(score_heads))
        self.dt_proj = nn.Linear(kv_width, score_heads, bias)
        self.q_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.attn_sub_norm = RMSNorm(width, eps) if sub_norm else None
        self.o_proj = make_linear(weight, width, dim, bias, norm)
        self.reset_parameters()

    def initial(self) -> dict[str, Tensor]:
        """First values of the parameters that are no projection: A = 0, every key worth as much, the newest kept."""
        return {"A": torch.zeros_like(self.A)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to its first values."""
        for name, value in self.initial().items():
            getattr(self, name).copy_(value)

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
        scores = ops.key_scores(v, self.A, self.dt_proj.weight, self.dt_proj.bias)  # [B, score_heads, T]
        seen = unpadded(mask, x.shape[1])
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
        layer = dynamic_mask_layer(past_key_values, self.layer_idx)
        documents = packed(mask, layer)
        if layer is not None:
            k, v, scores = layer.extend(k, v, scores, self.window)
        hidden = None if seen is None else scores != -torch.inf
        if self.selection == "ratio_legacy":
            scores = _drop_lowest(scores, self.ratio, documents)
        dropout = self.attention_dropout if self.training else 0.0
        causal = seen is None and q.shape[2] in (1, k.shape[2]) and self.selection != "ratio_legacy"
        if self.kind != "dense" and causal and not dropout and is_exact(x):
            y = evaluation.dynamic_mask_attention(q, k, v, scores, self.window, documents)
        else:
            y = ops.dynamic_mask_attention(q, k, v, scores, self.window, hidden, dropout, documents)
        if self.keyless_mean and seen is not None and v.shape[2] == x.shape[1]:
            keyless = seen.cumsum(1)[:, None, :, None] == 0
            y = torch.where(keyless, v.mean(2, keepdim=True).repeat_interleave(self.heads // v.shape[1], 1), y)
        y = y.transpose(1, 2).flatten(2)  # [B, T, heads * d]
        return self.o_proj(y if self.attn_sub_norm is None else self.attn_sub_norm(y))

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, selection={self.selection!r}, "
            f"window={self.window}"
        )


class DMAttn(DynamicMaskAttention):
    """The Wonderful Matrices seed's module: `DynamicMaskAttention` with biases, A = 1, and every key kept by default.

    forward(hidden_states, attention_mask, position_ids, past_key_values) -> (y [B, T, d_model], past_key_values):
    attention_mask is [B, S], 1 at tokens and 0 at padding, S counting cached tokens too; past_key_values a transformers
    `Cache` whose layer number `layer_idx` is a `DynamicMaskLayer`, or None. rope_theta turns q and k by their
    positions, which position_ids [B, T] can name; otherwise they are counted from the first token of the cache.
    n_kv_heads, qk_norm, selection, window, ratio and others: as for `DynamicMaskAttention`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        max_position_embeddings: int,
        layer_idx: int | None = None,
        *,
        n_kv_heads: int | None = None,
        selection: Selection = "none",
        bias: bool = True,
        rope_theta: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            *(d_model, n_heads, n_kv_heads),
            selection=selection,
            max_positions=max_position_embeddings,
            bias=bias,
            layer_idx=0 if layer_idx is None else layer_idx,
            **options,
        )
        self.max_positions = max_position_embeddings
        self.rotary_emb = None
        if rope_theta is not None:
            self.rotary_emb = RotaryEmbedding(self.head_dim, max_position_embeddings, rope_theta)

    def initial(self) -> dict[str, Tensor]:
        return {"A": torch.ones_like(self.A)}

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> tuple[Tensor, Any]:
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ThriftyError(
                f"[DMAttn] attention_mask must be [B, S], 1 at tokens; got {tuple(attention_mask.shape)}; causality is "
                "built in, give the padding only"
            )
        layer = dynamic_mask_layer(past_key_values, self.layer_idx)
        seen = 0 if layer is None else layer.seen
        total = seen + hidden_states.shape[1]
        if total > self.max_positions:
            raise ThriftyError(
                f"[DMAttn] the text must fit max_position_embeddings = {self.max_positions}; got {total} tokens; "
                "shorten it or raise the limit"
            )
        rotary = None
        if self.rotary_emb is not None:
            if position_ids is None:
                position_ids = torch.arange(seen, total, device=hidden_states.device)[None]
            rotary = self.rotary_emb(position_ids)
        mask = None if attention_mask is None else attention_mask.bool()
        return super().forward(hidden_states, rotary, mask, past_key_values), past_key_values


def kept_keys(
    selection: str,
    keep_window_size: int | None = None,
    dynamic_mask_ratio: float = 0.0,
    max_position_embeddings: int | None = None,
    sliding_window: int | None = None,
) -> int | None:
    """w, the keys that a head keeps: keep_window_size, or int(dynamic_mask_ratio * max_position_embeddings); None: all.

    Raises ThriftyError, by the names that configurations have, for an unknown selection, for w < 1, and for a sliding
    window beside it.
    """
    if selection not in SELECTIONS:
        raise ThriftyError(
            f"[dynamic_mask] dynamic_mask_selection must be one of {', '.join(SELECTIONS)}; got '{selection}'"
        )
    if sliding_window is not None:
        raise ThriftyError(
            f"[dynamic_mask] sliding_window must be None, as keys that leave it make room for evicted ones; got "
            f"{sliding_window}; set it to None, keep_window_size bounds the keys"
        )
    if selection == "keep_window" and (not isinstance(keep_window_size, int) or keep_window_size < 1):
        raise ThriftyError(
            f"[dynamic_mask] keep_window_size must be an integer of at least 1; got {keep_window_size!r}; "
            "dynamic_mask_selection='none' keeps every key"
        )
    if selection == "ratio":
        window = int(dynamic_mask_ratio * (max_position_embeddings or 0))
        if not 0 < dynamic_mask_ratio <= 1 or window < 1:
            raise ThriftyError(
                "[dynamic_mask] dynamic_mask_ratio must be in (0, 1] and keep one key of max_position_embeddings; got "
                f"{dynamic_mask_ratio} of {max_position_embeddings}; dynamic_mask_selection='none' keeps every key"
            )
        return window
    if selection == "ratio_legacy" and not 0 <= dynamic_mask_ratio < 1:
        raise ThriftyError(
            f"[dynamic_mask] dynamic_mask_ratio must be in [0, 1) for 'ratio_legacy'; got {dynamic_mask_ratio}"
        )
    return keep_window_size if selection == "keep_window" else None


def _drop_lowest(scores: Tensor, ratio: float, documents: Tensor | None) -> Tensor:
    """scores [B, h, S] far below the others where less than the int(ratio * S)-th lowest of their head or document."""
    low = torch.zeros_like(scores, dtype=torch.bool)
    for row, at in pieces(documents, len(scores)):
        one = scores[row, :, at]
        n = int(ratio * one.shape[-1])
        if n:
            low[row, :, at] = one < one.kthvalue(n, -1, keepdim=True).values
    # Finite: a query that has lost all its keys takes their mean; the code that this reproduces adds keys to come.
    return scores.masked_fill(low, -1e20)
