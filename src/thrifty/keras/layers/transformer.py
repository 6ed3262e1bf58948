"""Parts of transformers."""

from typing import Any

import keras

from thrifty.errors import ThriftyError
from thrifty.keras.layers.cached_attention import CachedMultiHeadAttention

__all__ = ["CachedMultiHeadAttention", "FeedForwardGate"]


@keras.saving.register_keras_serializable(package="thrifty")
class FeedForwardGate(keras.layers.Layer):
    """y = (gelu(x W_g) * (x W_l)) W_o, without biases; gelu(z) = z Phi(z), not its tanh form (GEGLU, arXiv 2002.05202).

    x: [..., d] -> [..., input_dim], d need not be input_dim; W_g, W_l: [d, hidden_dim], W_o: [hidden_dim, input_dim].
    Masks pass. Raises ThriftyError where a size is not a positive integer.
    """

    def __init__(self, input_dim: int, hidden_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, size in (("input_dim", input_dim), ("hidden_dim", hidden_dim)):
            if not isinstance(size, int) or size < 1:
                raise ThriftyError(f"[FeedForwardGate] {name} must be a positive integer; got {size}; give 1 or more")
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.supports_masking = True
        self._gelu = self._dense(hidden_dim, "gate", activation="gelu")
        self._linear = self._dense(hidden_dim, "linear")
        self._output = self._dense(input_dim, "output")

    def _dense(self, units: int, name: str, activation: str | None = None) -> keras.layers.Dense:
        return keras.layers.Dense(units, activation, use_bias=False, name=name, dtype=self.dtype_policy)

    def build(self, input_shape) -> None:
        self._gelu.build(input_shape)
        self._linear.build(input_shape)
        self._output.build((*input_shape[:-1], self.hidden_dim))

    def call(self, inputs):
        return self._output(self._gelu(inputs) * self._linear(inputs))

    def compute_output_shape(self, input_shape) -> tuple:
        return (*input_shape[:-1], self.input_dim)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "input_dim": self.input_dim, "hidden_dim": self.hidden_dim}
