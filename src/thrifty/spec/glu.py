import math
from collections.abc import Callable

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


#: Activations by transformers' names: sigmoid 1 / (1 + e^-x); silu x sigmoid(x); gelu x Phi(x); relu2 max(x, 0)^2
#: (arXiv 2109.08668).
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: (x * 0.5 * (1 + _erf(x / math.sqrt(2)))).astype(x.dtype),
    "gelu_pytorch_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "sigmoid": _sigmoid,
}


def glu(gate: np.ndarray, up: np.ndarray, act: str) -> np.ndarray:
    """y = act(gate) * up, elementwise (GLU variants, arXiv 2002.05202). float32 arrays of one shape."""
    return ACTIVATIONS[act](gate) * up
