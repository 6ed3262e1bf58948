"""Activations over preallocated arrays, as `spec.ACTIVATIONS` and `spec.glu` define them."""

from collections.abc import Callable

import numpy as np

from thrifty.spec import ACTIVATIONS

#: Writes act(x) to its second argument.
Activation = Callable[[np.ndarray, np.ndarray], None]


def _silu(x: np.ndarray, out: np.ndarray) -> None:
    # exp overflows to infinity for x below -88, and x / infinity is the zero that the stable form gives.
    np.negative(x, out)
    np.exp(out, out)
    np.add(out, np.float32(1), out)
    np.divide(x, out, out)


def _relu2(x: np.ndarray, out: np.ndarray) -> None:
    np.maximum(x, np.float32(0), out=out)
    np.multiply(out, out, out)


def activation(name: str) -> Activation:
    """The activation `name`, written to an array."""
    if name == "silu":
        return _silu
    if name == "relu2":
        return _relu2
    act = ACTIVATIONS[name]
    return lambda x, out: np.copyto(out, act(x))
