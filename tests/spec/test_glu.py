import math

import numpy as np
import pytest

from thrifty.spec import ACTIVATIONS, glu

SCALARS = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas(name):
    x = np.linspace(-8, 8, 101, dtype=np.float32)
    y = ACTIVATIONS[name](x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [SCALARS[name](float(v)) for v in x], rtol=2e-6, atol=1e-5)


def test_silu_does_not_overflow():
    assert ACTIVATIONS["silu"](np.array([-1000, 1000], np.float32)).tolist() == [0, 1000]


def test_glu_gates():
    np.testing.assert_array_equal(glu(np.array([-1, 2], np.float32), np.array([5, 7], np.float32), "relu2"), [0, 28])
