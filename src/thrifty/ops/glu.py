"""Activations and gated linear units."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from thrifty import native
from thrifty.errors import ThriftyError
from thrifty.ops.dispatch import is_evaluation


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


#: Activations by transformers' names, those of `thrifty.spec.ACTIVATIONS`.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
    "sigmoid": torch.sigmoid,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name. Raises ThriftyError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ThriftyError(f"[activation] must be one of {', '.join(ACTIVATIONS)}; got '{name}'")
    return ACTIVATIONS[name]


def glu(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """y = act(gate) * up, elementwise, or act(gate) where up is None (arXiv 2002.05202).

    Evaluated without gradients in float32 on a CPU, it gives the bits of the runtime: what follows is quantised, where
    a last bit can move a code.
    """
    if is_evaluation(gate):
        second = None if up is None else up.contiguous().numpy()
        return torch.from_numpy(native.glu(gate.contiguous().numpy(), second, act))
    y = activation(act)(gate)
    return y if up is None else y * up
