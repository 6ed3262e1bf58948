from typing import Any

from torch import Tensor, nn

from thrifty import ops
from thrifty.nn.cache import packed, recurrent_layer, unpadded
from thrifty.nn.linear import Linear, Norm, make_linear
from thrifty.nn.norm import RMSNorm


class MLGRU(nn.Module):
    """y = o(norm(g * h)), h_t = f_t * h_{t-1} + (1 - f_t) * c_t (MatMul-free LM, arXiv 2406.02528, section 3.3.1).

    f = sigmoid(W_f x + b_f), c = silu(W_c x + b_c), g = sigmoid(W_g x + b_g): no product between a state and a weight,
    and with weight="ternary" none with a float weight. x: [B, T, dim] -> [B, T, dim]. sub_norm puts an RMSNorm with
    gain before `o`. weight, norm: as for `BitFeedForward`.

    forward(x, rotary, mask, past_key_values): called as `BitAttention` is; rotary is ignored, for a recurrence knows
    where it is; mask is boolean [B, S], False at padding, which leaves the state untouched, or int64 [B, T], the
    document of each token, whose state begins at zero; without documents the state [B, dim] is read from and kept in
    the `RecurrentLayer` number `layer_idx` of past_key_values.
    """

    def __init__(
        self,
        dim: int,
        *,
        bias: bool = True,
        sub_norm: bool = False,
        weight: Linear = "ternary",
        norm: Norm = "rms",
        eps: float = 1e-5,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.f_proj = make_linear(weight, dim, dim, bias, norm)
        self.c_proj = make_linear(weight, dim, dim, bias, norm)
        self.g_proj = make_linear(weight, dim, dim, bias, norm)
        self.attn_sub_norm = RMSNorm(dim, eps) if sub_norm else None
        self.o_proj = make_linear(weight, dim, dim, bias, norm)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        projections = ((self.f_proj, "sigmoid"), (self.c_proj, "silu"), (self.g_proj, "sigmoid"))
        f, c, g = (ops.glu(project(x), None, act) for project, act in projections)
        kept = unpadded(mask, x.shape[1])
        if kept is not None:
            f = f.masked_fill(~kept[..., None], 1.0)
        layer = recurrent_layer(past_key_values, self.layer_idx)
        start = None if layer is None or layer.state is None else layer.state.to(x.device)
        h, state = ops.mlgru(f, c, start, packed(mask, layer))
        if layer is not None:
            layer.keep(state, x.shape[1])
        y = g * h
        return self.o_proj(y if self.attn_sub_norm is None else self.attn_sub_norm(y))
