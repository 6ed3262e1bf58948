"""What the projections of a layer are made of."""

from typing import Any, Literal

import keras
from keras import constraints, initializers, regularizers

from thrifty.errors import ThriftyError
from thrifty.keras.layers.core import DenseMML, own_initializer, serialized

#: Kinds of linear layers that a layer's projections can be.
Linear = Literal["dense", "ternary"]
LINEARS = ("dense", "ternary")


class Projections:
    """Makes the projections of a layer: `keras.layers.Dense`, or with linear="ternary" `DenseMML`, all with the same
    options, which are those of `keras.layers.Dense`.

    Raises ThriftyError, by the name of the layer, for an unknown kind.
    """

    def __init__(
        self,
        layer: str,
        linear: Linear,
        use_bias: bool,
        kernel_initializer: Any,
        bias_initializer: Any,
        kernel_regularizer: Any,
        bias_regularizer: Any,
        kernel_constraint: Any,
        bias_constraint: Any,
    ) -> None:
        if linear not in LINEARS:
            raise ThriftyError(f"[{layer}] linear must be one of {', '.join(LINEARS)}; got {linear!r}")
        self.linear, self.use_bias = linear, use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)

    def make(self, units: int, name: str, dtype: Any, *, dense: bool = False, use_bias: bool | None = None):
        """A projection to so many units. dense: of that kind whatever the others are."""
        kind = keras.layers.Dense if dense or self.linear == "dense" else DenseMML
        return kind(
            units,
            use_bias=self.use_bias if use_bias is None else use_bias,
            kernel_initializer=own_initializer(self.kernel_initializer),
            bias_initializer=own_initializer(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            name=name,
            dtype=dtype,
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments but for the layer's name, serialised."""
        return {"linear": self.linear, "use_bias": self.use_bias, **serialized(self, "kernel", "bias")}
