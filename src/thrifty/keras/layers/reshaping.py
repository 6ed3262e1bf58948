"""Reshapes relative to the shape that comes in."""

import operator
import warnings
from typing import Any

import keras
from keras import ops

from thrifty.errors import ThriftyError, ThriftyWarning


class _Relative(keras.layers.Layer):
    """One row-major reshape of [d_0, ..., d_n] to `resized(d_0, ..., d_n)`; dimensions may be unknown (None)."""

    def resized(self, shape: tuple) -> list:
        raise NotImplementedError

    def axes(self, rank: int) -> tuple[int, int]:
        """Both axes, counted from the front of what has `rank` axes."""
        raise NotImplementedError

    def call(self, inputs):
        return ops.reshape(inputs, self.resized(ops.shape(inputs)))

    def compute_output_shape(self, input_shape) -> tuple:
        return tuple(self.resized(tuple(input_shape)))

    def compute_mask(self, inputs, previous_mask):
        """The mask of the input, where none of the masked axes is touched; else none, with a warning."""
        if previous_mask is None or min(self.axes(len(inputs.shape))) >= len(previous_mask.shape):
            return previous_mask
        warnings.warn(f"[{type(self).__name__}] no mask fits the axes changed; it is dropped", ThriftyWarning, 2)
        return None

    def _counted(self, name: str, axis: int, rank: int) -> int:
        if not -rank <= axis < rank:
            raise ThriftyError(
                f"[{type(self).__name__}] {name} must be an axis of the {rank} there are; got {axis}; "
                f"give one of {-rank} ... {rank - 1}"
            )
        return axis % rank

    def _distinct(self, left: int, right: int) -> None:
        if left == right:
            raise ThriftyError(f"[{type(self).__name__}] the axes must differ; both are axis {left}; give two")


@keras.saving.register_keras_serializable(package="thrifty")
class Divide(_Relative):
    """d_i -> d_i / factor, d_o -> d_o factor, by one row-major reshape.

    i = input_axis and o = output_axis count the axes of the output. With `insert`, the output has an axis more: o, of
    size `factor`. Nothing is transposed: [4, 6] divided along axis 0 by 2 into axis 1 gives [2, 12], whose rows are
    pairs of the old rows. [B, T, E] with input_axis=1, output_axis=-1, factor=4 gives [B, T / 4, 4 E], T may be None.

    A mask passes where its axes stay as they are. Raises ThriftyError where d_i is known and is no multiple of factor,
    where an axis is not there, where both are the same (the inserted axis has nothing to divide), where factor < 1.
    """

    def __init__(self, input_axis: int, output_axis: int, factor: int, insert: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if operator.index(factor) < 1:
            raise ThriftyError(f"[Divide] factor must be a positive integer; got {factor}; give 1 or more")
        self.input_axis = operator.index(input_axis)
        self.output_axis = operator.index(output_axis)
        self.factor = operator.index(factor)
        self.insert = bool(insert)

    def axes(self, rank: int) -> tuple[int, int]:
        rank += self.insert
        return self._counted("input_axis", self.input_axis, rank), self._counted("output_axis", self.output_axis, rank)

    def resized(self, shape: tuple) -> list:
        i, o = self.axes(len(shape))
        sizes = list(shape)
        if self.insert:
            if i == o:
                raise ThriftyError(f"[Divide] input_axis must not be the inserted axis; both are {i}; give another")
            sizes.insert(o, 1)
        self._distinct(i, o)
        if isinstance(sizes[i], int) and sizes[i] % self.factor:
            raise ThriftyError(
                f"[Divide] axis {self.input_axis} must be a multiple of factor={self.factor}; got {sizes[i]} in "
                f"{tuple(shape)}; pad it, or choose a factor that divides it"
            )
        sizes[i] = None if sizes[i] is None else sizes[i] // self.factor
        sizes[o] = None if sizes[o] is None else sizes[o] * self.factor
        return sizes

    def get_config(self) -> dict[str, Any]:
        own = {"input_axis": self.input_axis, "output_axis": self.output_axis}
        return {**super().get_config(), **own, "factor": self.factor, "insert": self.insert}


@keras.saving.register_keras_serializable(package="thrifty")
class Merge(_Relative):
    """d_l, d_r -> d_l d_r, by one row-major reshape: at l = left_axis where `left`, else at r = right_axis.

    The other axis goes. Nothing is transposed: neighbours merge as one thinks, [B, T, g, E] into [B, T, g E] by
    default; axes further apart leave the order of the elements as it is, so that slabs of them follow each other.
    `Merge(-2, -1)` undoes `Divide(-2, -1, factor, insert=True)`.

    A mask passes where its axes stay as they are. Raises ThriftyError where an axis is not there, or both are the same.
    """

    def __init__(self, left_axis: int = -2, right_axis: int = -1, left: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.left_axis = operator.index(left_axis)
        self.right_axis = operator.index(right_axis)
        self.left = bool(left)

    def axes(self, rank: int) -> tuple[int, int]:
        return self._counted("left_axis", self.left_axis, rank), self._counted("right_axis", self.right_axis, rank)

    def resized(self, shape: tuple) -> list:
        l, r = self.axes(len(shape))
        self._distinct(l, r)
        kept, gone = (l, r) if self.left else (r, l)
        sizes = list(shape)
        sizes[kept] = None if None in (sizes[l], sizes[r]) else sizes[l] * sizes[r]
        del sizes[gone]
        return sizes

    def get_config(self) -> dict[str, Any]:
        own = {"left_axis": self.left_axis, "right_axis": self.right_axis, "left": self.left}
        return {**super().get_config(), **own}
