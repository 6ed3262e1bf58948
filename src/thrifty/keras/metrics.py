"""Accuracies of groups of predictions: a group is right where all of it is."""

import operator
from typing import Any

import keras
from keras import ops

from thrifty.errors import ThriftyError


class _GroupAccuracy(keras.metrics.Mean):
    """The weighted mean, over groups of `group` neighbours, of whether all of a group match."""

    def __init__(self, group: int | None, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype)
        if group is not None and operator.index(group) < 0:
            raise self._error(f"group must not be negative; got {group}; give 1 to count each element")
        self.group = group
        self._direction = "up"  # read by callbacks that are not told which way is better

    def matches(self, y_true, y_pred):
        """bool [..., S]: which elements are right."""
        raise NotImplementedError

    def update_state(self, y_true, y_pred, sample_weight=None) -> None:
        weights = [w for w in (sample_weight, getattr(y_pred, "_keras_mask", None)) if w is not None]
        matches = self.matches(ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred))
        group, length = self.group or 1, matches.shape[-1]
        if length is not None and length % group:
            raise self._error(f"the length must be a multiple of group={group}; got {length}; pad to a multiple")
        *batch, length = ops.shape(matches)
        right = ops.all(ops.reshape(matches, (*batch, length // group, group)), axis=-1)
        weight = None
        for w in weights:
            w = self._of_groups(ops.cast(ops.convert_to_tensor(w), self.dtype), matches)
            weight = w if weight is None else weight * w
        super().update_state(ops.cast(right, self.dtype), weight)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "group": self.group}

    def _of_groups(self, weight, matches):
        """Weights of samples, elements or groups as weights of groups; a group weighs the mean of its elements."""
        missing = len(matches.shape) - len(weight.shape)
        if missing > 0:
            return ops.reshape(weight, (*ops.shape(weight), *[1] * missing))
        length, group = matches.shape[-1], self.group or 1
        if weight.shape[-1] == 1:
            return weight
        if missing or (None not in (length, weight.shape[-1]) and weight.shape[-1] not in (length, length // group)):
            raise self._error(
                f"weights are of samples, of elements or of groups of {group}; got the shape {tuple(weight.shape)} for "
                f"elements {tuple(matches.shape)}; give one of the three"
            )
        return ops.mean(ops.reshape(weight, (*ops.shape(weight)[:-1], ops.shape(matches)[-1] // group, -1)), axis=-1)

    def _error(self, text: str) -> ThriftyError:
        return ThriftyError(f"[{type(self).__name__}] {text}")

    def _mismatch(self, y_true, y_pred, expected: str) -> ThriftyError:
        return self._error(f"{expected}; got {tuple(y_true.shape)} and {tuple(y_pred.shape)}; reshape one")


@keras.saving.register_keras_serializable(package="thrifty")
class CategoricalGroupAccuracy(_GroupAccuracy):
    """mean over groups of prod_{s in group} [argmax y_true_s = argmax y_pred_s]: a group is right or wrong as a whole.

    y_pred: probabilities or logits [..., S, C]; y_true: one-hot [..., S, C], or classes [..., S]. `group` neighbours
    along S make a group: bytes a character, say. 1, 0 and None count each element. sample_weight: one for a sample [B],
    for an element [..., S] (a group weighs the mean of its elements) or for a group [..., S / group]; masks of Keras
    weigh elements by 0 and 1. Saved and loaded with a compiled model.

    Raises ThriftyError where the shapes do not fit each other, where S is no multiple of group, where group < 0.
    """

    def __init__(self, group: int | None = 4, name: str = "categorical_group_accuracy", dtype: Any = None) -> None:
        super().__init__(group, name, dtype)

    def matches(self, y_true, y_pred):
        true, pred = tuple(y_true.shape), tuple(y_pred.shape)
        one_hot = len(true) == len(pred)
        fits = one_hot or len(true) + 1 == len(pred)
        if len(pred) < 2 or not fits or any(None not in (n, m) and n != m for n, m in zip(true, pred, strict=False)):
            raise self._mismatch(
                y_true, y_pred, "y_true is one-hot [..., S, C] or classes [..., S], y_pred [..., S, C]"
            )
        best = ops.argmax(y_pred, axis=-1)
        return ops.equal(ops.argmax(y_true, axis=-1) if one_hot else ops.cast(y_true, best.dtype), best)


@keras.saving.register_keras_serializable(package="thrifty")
class BinaryGroupAccuracy(_GroupAccuracy):
    """mean over groups of prod_{s in group} [y_true_s = (y_pred_s > threshold)]: a group is right or wrong as a whole.

    y_true: 0 or 1, y_pred: probabilities (logits, whose sigmoid is compared, with from_logits), both [..., S]. `group`
    neighbours along the last axis make a group: the bits of a byte with group=8. The rest is as for
    `CategoricalGroupAccuracy`. Raises ThriftyError also where threshold is not between 0 and 1.
    """

    def __init__(
        self,
        group: int | None = 4,
        threshold: float = 0.5,
        from_logits: bool = False,
        name: str = "binary_group_accuracy",
        dtype: Any = None,
    ) -> None:
        super().__init__(group, name, dtype)
        if not 0 < threshold < 1:
            raise self._error(f"threshold must lie between 0 and 1; got {threshold}; logits need from_logits=True")
        self.threshold = threshold
        self.from_logits = from_logits

    def matches(self, y_true, y_pred):
        true, pred = tuple(y_true.shape), tuple(y_pred.shape)
        if (
            not pred
            or len(true) != len(pred)
            or any(None not in (n, m) and n != m for n, m in zip(true, pred, strict=True))
        ):
            raise self._mismatch(y_true, y_pred, "y_true and y_pred have one shape [..., S]")
        probabilities = ops.sigmoid(y_pred) if self.from_logits else y_pred
        return ops.equal(ops.cast(y_true, self.dtype) > 0.5, probabilities > self.threshold)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "threshold": self.threshold, "from_logits": self.from_logits}
