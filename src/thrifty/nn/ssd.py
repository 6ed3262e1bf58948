from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty import ops
from thrifty.errors import ThriftyError
from thrifty.nn.cache import packed, recurrent_layer, unpadded
from thrifty.nn.linear import ExactLinear, Linear, Norm, is_exact, make_linear
from thrifty.nn.norm import RMSNorm
from thrifty.ops import evaluation


class SSD(nn.Module):
    """y = o(norm(h C + D x)), h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T (Mamba-2, arXiv 2405.21060, section 6).

    x, B, C are projections of the input, dt = softplus of one per head, A = -exp(A_log) < 0. x: [B, T, d_model] ->
    [B, T, d_model], any T. n_heads heads of d_model / n_heads features (head_dim, where given); head h reads B and C,
    of d_state features, of group h // (n_heads / n_groups). skip: with D. sub_norm puts an RMSNorm with gain before
    `o`. weight, norm: as for `BitFeedForward`; `dt_proj` is dense whatever they are.

    forward(x, rotary, mask, past_key_values): called as `BitAttention` is; with rotary, B and C are turned by their
    positions (Wonderful Matrices, arXiv 2412.11834), for which d_state must be rotary's head_dim; mask is boolean
    [B, S], False at padding, which leaves the state untouched, or int64 [B, T], the document of each token, whose state
    begins at zero; without documents the state [B, n_heads, head_dim, d_state] is read from and kept in the
    `RecurrentLayer` number `layer_idx` of past_key_values. Raises ThriftyError where heads, groups and
    widths do not divide.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_state: int | None = None,
        n_groups: int | None = None,
        chunk_len: int = 256,
        layer_idx: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        skip: bool = True,
        sub_norm: bool = False,
        weight: Linear = "dense",
        norm: Norm = "rms",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        groups = n_heads if n_groups is None else n_groups
        if n_heads < 1 or groups < 1 or n_heads % groups or (head_dim is None and d_model % n_heads):
            raise ThriftyError(
                "[SSD] n_heads must divide d_model, and n_groups divide n_heads; "
                f"got d_model {d_model}, n_heads {n_heads}, n_groups {groups}"
            )
        if chunk_len < 1:
            raise ThriftyError(f"[SSD] chunk_len must be at least 1; got {chunk_len}")
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.state_dim = self.head_dim if d_state is None else d_state
        self.heads, self.groups, self.chunk, self.kind = n_heads, groups, chunk_len, weight
        self.layer_idx = 0 if layer_idx is None else layer_idx
        inner = n_heads * self.head_dim
        self.x_proj = make_linear(weight, d_model, inner, bias, norm)
        self.b_proj = make_linear(weight, d_model, groups * self.state_dim, bias, norm)
        self.c_proj = make_linear(weight, d_model, groups * self.state_dim, bias, norm)
        self.dt_proj = (nn.Linear if weight == "dense" else ExactLinear)(d_model, n_heads, bias)
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads)) if skip else None
        self.attn_sub_norm = RMSNorm(inner, eps) if sub_norm else None
        self.o_proj = make_linear(weight, inner, d_model, bias, norm)
        self.reset_parameters()

    def initial(self) -> dict[str, Tensor]:
        """First values of the parameters that are no projection: A = -1 ... -n_heads, from long memory to short."""
        first = {"A_log": torch.arange(1, self.heads + 1, dtype=torch.float32).log()}
        return first if self.D is None else {**first, "D": torch.ones(self.heads)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A and D to their first values."""
        for name, value in self.initial().items():
            getattr(self, name).copy_(value)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        values = self.x_proj(x).unflatten(-1, (self.heads, self.head_dim))
        B, C = (linear(x).unflatten(-1, (self.groups, self.state_dim)) for linear in (self.b_proj, self.c_proj))
        if rotary is not None:
            B, C = ops.apply_rope(B, *rotary), ops.apply_rope(C, *rotary)
        dt = self.dt_proj(x).float()
        kept = unpadded(mask, x.shape[1])
        if kept is not None:
            dt = dt.masked_fill(~kept[..., None], -torch.inf)
        layer = recurrent_layer(past_key_values, self.layer_idx)
        state = None if layer is None or layer.state is None else layer.state.to(x.device)
        documents = packed(mask, layer)
        A = -self.A_log.double().exp().float()
        if self.kind != "dense" and self.D is None and is_exact(x):
            y, state = evaluation.ssd(values, dt, A, B, C, state, documents)
        else:
            y, state = ops.ssd(values, F.softplus(dt), A, B, C, self.D, state, self.chunk, documents)
        if layer is not None:
            layer.keep(state, x.shape[1])
        y = y.flatten(2)
        return self.o_proj(y if self.attn_sub_norm is None else self.attn_sub_norm(y))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, state={self.state_dim}, groups={self.groups}"
