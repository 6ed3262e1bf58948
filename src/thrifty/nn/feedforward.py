from torch import Tensor, nn

from thrifty import ops
from thrifty.errors import ThriftyError
from thrifty.nn.linear import Linear, Norm, make_linear
from thrifty.nn.norm import RMSNorm


class BitFeedForward(nn.Module):
    """y = down(norm(act(up x))), or, with glu, y = down(norm(act(gate x) * up x)) (arXiv 2002.05202).

    x: [..., dim] -> y: [..., dim_out]. Hidden features: `hidden`, or dim * mult. activation: a key of
    `thrifty.ops.ACTIVATIONS`. post_act_norm puts an RMSNorm with gain (BitNet's `ffn_sub_norm`) before `down`; dropout
    follows it. weight: "ternary", "binary" or "dense" layers; norm: what each applies to its own input.
    Raises ThriftyError for an unknown activation, weight or norm.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: float = 4,
        *,
        hidden: int | None = None,
        glu: bool = False,
        activation: str = "gelu",
        dropout: float = 0.0,
        post_act_norm: bool = False,
        bias: bool = True,
        zero_init_output: bool = False,
        weight: Linear = "ternary",
        norm: Norm = "rms",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = int(dim * mult) if hidden is None else hidden
        if hidden < 1:
            raise ThriftyError(f"[BitFeedForward] needs at least one hidden feature; got {hidden}; raise mult")
        ops.activation(activation)
        self.activation = activation
        self.gate_proj = make_linear(weight, dim, hidden, bias, norm) if glu else None
        self.up_proj = make_linear(weight, dim, hidden, bias, norm)
        self.ffn_sub_norm = RMSNorm(hidden, eps) if post_act_norm else None
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.down_proj = make_linear(weight, hidden, dim_out or dim, bias, norm)
        if zero_init_output:
            for parameter in self.down_proj.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.up_proj(x), None) if self.gate_proj is None else (self.gate_proj(x), self.up_proj(x))
        h = ops.glu(gate, up, self.activation)
        if self.ffn_sub_norm is not None:
            h = self.ffn_sub_norm(h)
        if self.dropout is not None:
            h = self.dropout(h)
        return self.down_proj(h)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
