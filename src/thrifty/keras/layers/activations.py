"""Gated linear units of ternary layers."""

from typing import Any

import keras

from thrifty.errors import ThriftyError
from thrifty.keras.layers.core import DenseMML, PackedParts, features, positive

ACTIVATIONS = ("sigmoid", "linear", "relu", "gelu", "silu", "selu")


@keras.saving.register_keras_serializable(package="thrifty")
class GLUMML(PackedParts, keras.layers.Layer):
    """y = W_2 (act(g) * u) + b_2,  [g | u] = W_1 x + b_1 (GLU Variants Improve Transformer, arXiv 2002.05202, 2).

    W_1 and W_2 are ternary (`DenseMML`, each with its RMSNorm): [..., d] -> [..., 2 m] -> [..., units], rank 2 or more.
    m is `intermediate_size`, or int(d * hidden_ratio * 2 / 3) rounded up to a multiple of 256. activation is one of
    "sigmoid", "linear", "relu", "gelu", "silu", "selu". Masks pass through.

    Raises ThriftyError where units, intermediate_size or hidden_ratio is not positive, or the activation another.
    """

    def __init__(
        self,
        units: int,
        hidden_ratio: float = 4,
        intermediate_size: int | None = None,
        activation: str = "sigmoid",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        self.units = positive(name, "units", units)
        if intermediate_size is not None:
            intermediate_size = positive(name, "intermediate_size", intermediate_size)
        if not hidden_ratio > 0:
            raise ThriftyError(f"[{name}] hidden_ratio must be positive; got {hidden_ratio}; 4 is usual")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ThriftyError(
                f"[{name}] activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}; give its name"
            )
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(min_ndim=2)

    def build(self, input_shape) -> None:
        d = features(type(self).__name__, input_shape)
        size = self.intermediate_size or -(-int(d * self.hidden_ratio * 2 / 3) // 256) * 256
        self.gate_and_up = DenseMML(2 * size, dtype=self.dtype_policy, name="gate_and_up")
        self.down = DenseMML(self.units, dtype=self.dtype_policy, name="down")
        self.gate_and_up.build(input_shape)
        self.down.build((*input_shape[:-1], size))

    def call(self, inputs):
        gate, up = keras.ops.split(self.gate_and_up(inputs), 2, axis=-1)
        return self.down(keras.activations.get(self.activation)(gate) * up)

    def compute_output_shape(self, input_shape) -> tuple:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "hidden_ratio": self.hidden_ratio,
            "intermediate_size": self.intermediate_size,
            "activation": self.activation,
        }


class _Variant(GLUMML):
    fixed: str

    def __init__(
        self, units: int, hidden_ratio: float = 4, intermediate_size: int | None = None, **kwargs: Any
    ) -> None:
        if "activation" in kwargs:
            raise ThriftyError(
                f"[{type(self).__name__}] its activation is {self.fixed}; got activation={kwargs['activation']!r}; "
                f"leave it out, or use GLUMML"
            )
        super().__init__(units, hidden_ratio, intermediate_size, self.fixed, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["activation"]
        return config


@keras.saving.register_keras_serializable(package="thrifty")
class BilinearMML(_Variant):
    """`GLUMML` without an activation: y = W_2 (g * u) + b_2. An `activation` is refused."""

    fixed = "linear"


@keras.saving.register_keras_serializable(package="thrifty")
class GeGLUMML(_Variant):
    """`GLUMML` with act(g) = g Phi(g), the exact GELU. An `activation` is refused."""

    fixed = "gelu"


@keras.saving.register_keras_serializable(package="thrifty")
class ReGLUMML(_Variant):
    """`GLUMML` with act(g) = max(g, 0). An `activation` is refused."""

    fixed = "relu"


@keras.saving.register_keras_serializable(package="thrifty")
class SeGLUMML(_Variant):
    """`GLUMML` with act = SELU (arXiv 1706.02515). An `activation` is refused."""

    fixed = "selu"


@keras.saving.register_keras_serializable(package="thrifty")
class SwiGLUMML(_Variant):
    """`GLUMML` with act(g) = g sigmoid(g). An `activation` is refused."""

    fixed = "silu"
