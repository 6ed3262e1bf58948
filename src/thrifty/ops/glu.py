"""Activations and gated linear units."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from thrifty.errors import ThriftyError


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


#: Activations by transformers' names, those of `thrifty.spec.ACTIVATIONS`.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name. Raises ThriftyError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ThriftyError(f"[activation] must be one of {', '.join(ACTIVATIONS)}; got '{name}'")
    return ACTIVATIONS[name]


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """y = act(gate) * up, elementwise (arXiv 2002.05202)."""
    return activation(act)(gate) * up
