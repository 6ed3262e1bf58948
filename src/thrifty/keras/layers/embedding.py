"""Embeddings of positions."""

import operator
from typing import Any

import keras
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.spec import rope_frequencies

#: Beyond this, float32 no longer tells neighbouring positions apart.
MAX_POSITIONS = 1 << 24


@keras.saving.register_keras_serializable(package="thrifty")
class RotaryPositionalEmbedding(keras.layers.Layer):
    """(a, b) -> (a cos t - b sin t, b cos t + a sin t), a and b the halves of the features (arXiv 2104.09864).

    t_k = (position + offset) / scaling_factor · max_wavelength^(-2k / D), k = 0 ... D / 2 - 1, for D features along
    `feature_axis` and positions 0, 1, ... along `sequence_axis`; all other axes share them. Where D is odd, the last
    feature passes as it is, and D is one less. inputs: at least two axes, D known -> the same shape in the compute
    dtype; angles and products are float32 at least, whatever the dtype. Has no variables; passes masks.

    call(inputs, offset=0): offset, an integer or an integer tensor without axes (which may be traced), is the position
    of the first element: the number of positions already decoded.

    Raises ThriftyError where both axes are the same or one is not there, where the number of features is unknown, where
    offset is no integer, and where a Python integer leads below 0 or beyond 2^24 positions (the value of a tensor is
    not looked at).
    """

    def __init__(
        self,
        sequence_axis: int = 1,
        feature_axis: int = -1,
        max_wavelength: float = 10_000,
        scaling_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("max_wavelength", max_wavelength), ("scaling_factor", scaling_factor)):
            if not value > 0:
                raise ThriftyError(f"[RotaryPositionalEmbedding] {name} must be positive; got {value}; give more")
        self.sequence_axis = operator.index(sequence_axis)
        self.feature_axis = operator.index(feature_axis)
        self.max_wavelength = max_wavelength
        self.scaling_factor = scaling_factor
        self.supports_masking = True

    def build(self, input_shape) -> None:
        _, feature = self._axes(len(input_shape))
        features = input_shape[feature]
        if features is None:
            raise ThriftyError(
                f"[RotaryPositionalEmbedding] the number of features must be known; got {tuple(input_shape)}; give it "
                f"in keras.Input"
            )
        self.input_spec = keras.layers.InputSpec(axes={self.feature_axis: features})
        # Plain numbers, in a tuple: torch.compile takes neither numpy arrays nor Keras' tracked lists as constants.
        self._frequencies = tuple(rope_frequencies(features // 2 * 2, self.max_wavelength).tolist())

    def call(self, inputs, offset=0):
        sequence, feature = self._axes(len(inputs.shape))
        length, half = ops.shape(inputs)[sequence], inputs.shape[feature] // 2
        angles = self._angles(length, offset)  # [S, D / 2]
        if sequence > feature:
            angles = ops.transpose(angles)
        sizes = [1] * len(inputs.shape)
        sizes[sequence], sizes[feature] = length, half
        exact = keras.backend.result_type(self.compute_dtype, "float32")
        cos, sin = (ops.cast(ops.reshape(table(angles), sizes), exact) for table in (ops.cos, ops.sin))
        x, before = ops.cast(inputs, exact), (slice(None),) * feature
        a, b, rest = (x[*before, part] for part in (slice(half), slice(half, 2 * half), slice(2 * half, None)))
        rotated = ops.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=feature)
        return ops.cast(rotated, self.compute_dtype)

    def compute_output_shape(self, input_shape) -> tuple:
        self._axes(len(input_shape))
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        axes = {"sequence_axis": self.sequence_axis, "feature_axis": self.feature_axis}
        scales = {"max_wavelength": self.max_wavelength, "scaling_factor": self.scaling_factor}
        return {**super().get_config(), **axes, **scales}

    def _axes(self, rank: int) -> tuple[int, int]:
        axes = (self.sequence_axis, self.feature_axis)
        if not all(-rank <= axis < rank for axis in axes) or axes[0] % rank == axes[1] % rank:
            raise ThriftyError(
                f"[RotaryPositionalEmbedding] sequence_axis and feature_axis must be two of the {rank} axes of the "
                f"input; got {axes[0]} and {axes[1]}; give two different ones"
            )
        return axes[0] % rank, axes[1] % rank

    def _angles(self, length, offset):
        _check_offset(offset, length)
        positions = ops.cast(ops.arange(length, dtype="int32") + ops.cast(offset, "int32"), "float32")
        frequencies = ops.convert_to_tensor(self._frequencies, "float32")
        return ops.expand_dims(positions / self.scaling_factor, -1) * frequencies


def _check_offset(offset: Any, length: Any) -> None:
    if isinstance(offset, int):
        last = offset + (length if isinstance(length, int) else 0)
        if offset < 0 or last > MAX_POSITIONS:
            raise ThriftyError(
                f"[RotaryPositionalEmbedding] positions must lie in 0 ... {MAX_POSITIONS - 1}, which float32 tells "
                f"apart; got offset={offset} and length {length}; give the number of positions decoded so far"
            )
    elif not keras.backend.is_int_dtype(getattr(offset, "dtype", float)) or len(offset.shape) > 0:
        raise ThriftyError(
            f"[RotaryPositionalEmbedding] offset must be one integer; got {offset}; give the first position"
        )
