import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty import ops
from thrifty.errors import ThriftyError
from thrifty.ops import evaluation
from thrifty.ops.dispatch import is_evaluation

#: Normalisations a BitLinear can apply to its input: none, RMSNorm (b1.58) or LayerNorm (v1), both without gain.
Norm = Literal["rms", "layer"] | None
NORMS = ("rms", "layer", None)
#: Kinds of linear layers a model can be built of.
Linear = Literal["ternary", "binary", "dense"]
LINEARS = (*ops.KINDS, "dense")


class BitLinear(nn.Module):
    """y = float32(q_x q_w^T) * (s_x * s_w) + b, q_x the int8 codes of norm(x), q_w low-bit codes of the weight.

    A drop-in for `nn.Linear`: x [..., in_features] -> y [..., out_features], parameters `weight` (latent, in any
    floating dtype) and `bias`. The product is that of the packed layer (`thrifty.nn.pack`), bit for bit; gradients go
    straight through the quantizers (`thrifty.ops.bit_linear`).

    weight="ternary" is b1.58 (arXiv 2402.17764), "binary" BitNet v1 (arXiv 2310.11453). norm="rms" or "layer" is
    applied to x first, without gain; norm=None is for blocks that have a norm of their own. `transposed` layers, which
    `thrifty.nn.ternarize` makes of GPT-2's `Conv1D`, keep their weight as [in_features, out_features]. A module set as
    `rms_norm` comes before all that: the norm with gain that transformers' `use_rms_norm` puts into a layer.
    Raises ThriftyError for an unknown weight or norm. Its pair is `thrifty.keras.layers.DenseMML`.
    """

    #: Whether the weight is stored as [in, out].
    transposed: bool = False
    #: How much of the quantisation counts while it warms up (`thrifty.ops.warm_linear`), a tensor []; None for all.
    quantization: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight: ops.Kind = "ternary",
        norm: Norm = "rms",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if weight not in ops.KINDS:
            raise ThriftyError(f"[BitLinear] weight must be one of {', '.join(ops.KINDS)}; got '{weight}'")
        check_norm(norm)
        self.in_features = in_features
        self.out_features = out_features
        self.kind: ops.Kind = weight
        self.norm: Norm = norm
        self.rms_norm: nn.Module | None = None
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight and bias as `nn.Linear` does."""
        nn.init.kaiming_uniform_(self.latent(), a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def latent(self) -> Tensor:
        """The weight as [out, in], whichever way it is stored."""
        return self.weight.T if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rms_norm is None else self.rms_norm(x)
        if self.quantization is not None:
            return ops.warm_linear(normalize(x, self.norm), self.latent(), self.bias, self.quantization, self.kind)
        return ops.bit_linear(normalize(x, self.norm), self.latent(), self.bias, self.kind)

    def extra_repr(self) -> str:
        return describe(self)


def make_linear(kind: Linear, in_features: int, out_features: int, bias: bool, norm: Norm = None) -> nn.Module:
    """A linear layer of that kind: a BitLinear, or `nn.Linear` (which ignores norm) for "dense"."""
    if kind not in LINEARS:
        raise ThriftyError(f"[linear] must be one of {', '.join(LINEARS)}; got '{kind}'")
    if kind == "dense":
        return nn.Linear(in_features, out_features, bias)
    return BitLinear(in_features, out_features, bias, weight=kind, norm=norm)


class ExactLinear(nn.Linear):
    """y = x W^T + b; evaluated without gradients in float32 on a CPU, the bits of the runtime, row by row.

    For what a last bit can turn over: scores that keys tie by, and what is quantised next. It is slower than
    `nn.Linear` where many rows come at once.
    """

    def forward(self, input: Tensor) -> Tensor:
        return evaluation.float_matmul(input, self.weight, self.bias) if is_exact(input) else super().forward(input)


def is_exact(x: Tensor) -> bool:
    """Whether x is evaluated with the bits of the runtime, where a layer owes them."""
    return is_evaluation(x) and not torch.is_autocast_enabled(x.device.type)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """x, rms_norm(x) or layer_norm(x) over the last dimension, without gain."""
    if norm == "rms":
        return ops.rms_norm(x)
    return F.layer_norm(x, x.shape[-1:]) if norm == "layer" else x


def check_norm(norm: Norm) -> None:
    """Raises ThriftyError for an unknown norm."""
    if norm not in NORMS:
        raise ThriftyError(f"[BitLinear] norm must be 'rms', 'layer' or None; got {norm!r}")


def describe(module) -> str:
    """The common part of the representations of latent and packed layers."""
    return (
        f"in_features={module.in_features}, out_features={module.out_features}, bias={module.bias is not None}, "
        f"weight={module.kind!r}, norm={module.norm!r}"
    )
