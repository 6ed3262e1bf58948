"""Divide and Merge: one row-major reshape, relative to the shape that comes in."""

import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError, ThriftyWarning
from thrifty.keras.layers.reshaping import Divide, Merge

DIVIDED = [
    ((2, 4, 6, 8), {"input_axis": 2, "output_axis": -1, "factor": 3}, (2, 4, 2, 24)),
    ((2, 4, 6, 8), {"input_axis": -2, "output_axis": -1, "factor": 4, "insert": True}, (2, 4, 6, 2, 4)),
    ((2, 16), {"input_axis": -2, "output_axis": -1, "factor": 4, "insert": True}, (2, 4, 4)),
    ((2, 4, 6, 8), {"input_axis": 2, "output_axis": -1, "factor": 3, "insert": True}, (2, 4, 2, 8, 3)),
    ((6, 4, 16), {"input_axis": 0, "output_axis": 1, "factor": 2}, (3, 8, 16)),
    ((3, 1, 7), {"input_axis": 2, "output_axis": 0, "factor": 7}, (21, 1, 1)),
    ((0, 4, 6), {"input_axis": 2, "output_axis": 1, "factor": 3}, (0, 12, 2)),
]
MERGED = [
    ((2, 4, 6, 8), {"left_axis": 1, "right_axis": -1, "left": False}, (2, 6, 32)),
    ((2, 4, 6, 8), {"left_axis": 1, "right_axis": -1, "left": True}, (2, 32, 6)),
    ((2, 4, 6, 8), {}, (2, 4, 48)),
    ((3, 4, 8), {"left_axis": 0, "right_axis": 1}, (12, 8)),
    ((2, 2, 3), {"left_axis": 0, "right_axis": -1, "left": False}, (2, 6)),
    ((0, 4, 8), {"left_axis": 0, "right_axis": 2}, (0, 4)),
]
CASES = [(Divide, *case) for case in DIVIDED] + [(Merge, *case) for case in MERGED]


@pytest.mark.parametrize(("kind", "shape", "options", "expected"), CASES)
def test_the_order_of_the_elements_stays(kind, shape, options, expected):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    layer = kind(**options)
    assert layer.compute_output_shape(shape) == expected
    y = layer(x)
    assert tuple(y.shape) == expected
    np.testing.assert_array_equal(ops.convert_to_numpy(y), x.reshape(expected))


def test_divide_groups_neighbours():
    x = np.arange(48, dtype=np.float32).reshape(2, 4, 6)
    y = ops.convert_to_numpy(Divide(input_axis=1, output_axis=-1, factor=2)(x))
    np.testing.assert_array_equal(y[0, 0], np.arange(12))


def test_merge_undoes_divide():
    x = np.arange(2 * 3 * 12, dtype=np.float32).reshape(2, 3, 12)
    y = Merge()(Divide(-2, -1, 4, insert=True)(x))
    np.testing.assert_array_equal(ops.convert_to_numpy(y), x)


def test_unknown_dimensions():
    assert Divide(0, 1, 2).compute_output_shape((None, 4, 16)) == (None, 8, 16)
    assert Divide(1, -1, 4).compute_output_shape((None, None, None)) == (None, None, None)
    assert Merge(1, 2).compute_output_shape((None, 4, 8)) == (None, 32)
    assert Merge(0, 1).compute_output_shape((2, None, 8)) == (None, 8)
    x = keras.Input((None, 16))
    grouped = Divide(1, -1, 4)(x)
    split = Divide(-2, -1, 4, insert=True)(x)
    model = keras.Model(x, [grouped, split, Merge(1, 2)(split)])
    assert [y.shape for y in model.outputs] == [(None, None, 64), (None, None, 4, 4), (None, None, 4)]
    for batch, length in ((2, 8), (3, 12)):
        data = np.arange(batch * length * 16, dtype=np.float32).reshape(batch, length, 16)
        grouped, split, merged = model.predict_on_batch(data)
        np.testing.assert_array_equal(grouped, data.reshape(batch, length // 4, 64))
        np.testing.assert_array_equal(split, data.reshape(batch, length, 4, 4))
        np.testing.assert_array_equal(merged, data.reshape(batch, 4 * length, 4))


@pytest.mark.parametrize("layer", [Divide(1, -1, 4, insert=True), Merge(0, -1, left=False)])
def test_config(layer):
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.compute_output_shape((2, 8, 6)) == layer.compute_output_shape((2, 8, 6))


def test_masks_pass_where_their_axes_stay():
    tokens = np.array([[1, 2, 0, 0]])
    embedded = keras.layers.Embedding(3, 6, mask_zero=True)(tokens)
    split = Divide(-2, -1, 3, insert=True)
    mask = split.compute_mask(embedded, embedded._keras_mask)
    np.testing.assert_array_equal(ops.convert_to_numpy(mask), tokens != 0)
    mask = Merge().compute_mask(split(embedded), mask)
    np.testing.assert_array_equal(ops.convert_to_numpy(mask), tokens != 0)
    with pytest.warns(ThriftyWarning, match=r"\[Divide\] no mask fits"):
        assert Divide(1, -1, 2).compute_mask(embedded, mask) is None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Divide(1, -1, 5), r"\[Divide\] axis 1 must be a multiple of factor=5; got 8 in \(2, 8, 16\)"),
        (lambda: Divide(2, 2, 3, insert=True), r"\[Divide\] input_axis must not be the inserted axis"),
        (lambda: Divide(-1, -1, 3, insert=True), r"\[Divide\] input_axis must not be the inserted axis"),
        (lambda: Divide(1, -2, 2), r"\[Divide\] the axes must differ; both are axis 1"),
        (lambda: Divide(3, 1, 2), r"\[Divide\] input_axis must be an axis of the 3 there are; got 3"),
        (lambda: Divide(1, -5, 2, insert=True), r"\[Divide\] output_axis must be an axis of the 4 there are; got -5"),
        (lambda: Divide(1, 2, 0), r"\[Divide\] factor must be a positive integer; got 0"),
        (lambda: Merge(1, -2), r"\[Merge\] the axes must differ; both are axis 1"),
        (lambda: Merge(1, 3), r"\[Merge\] right_axis must be an axis of the 3 there are; got 3"),
    ],
)
def test_what_does_not_fit_is_refused(layer, message):
    with pytest.raises(ThriftyError, match=message):
        layer()(ops.ones((2, 8, 16)))
    with pytest.raises(ThriftyError, match=message):
        layer()(keras.Input((8, 16), batch_size=2))
