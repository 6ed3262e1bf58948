import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import ThriftyError, spec
from thrifty.spec import FORMATS

SIZES = (1, 3, 16, 63, 64, 257, 500)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("cols", SIZES)
def test_unpack_inverts_pack(fmt, rows, cols):
    codes = np.random.default_rng(rows * 1000 + cols).choice(fmt.codes, (rows, cols)).astype(np.int8)
    packed = spec.pack(fmt, codes)
    assert packed.shape == fmt.packed_shape(rows, cols)
    assert packed.nbytes == fmt.nbytes(rows, cols)
    np.testing.assert_array_equal(spec.unpack(fmt, packed, rows, cols), codes)


@pytest.mark.parametrize(
    ("name", "bits"), [("i2", 2), ("base3", 1.6), ("base3_row", 1.6), ("row_block", 2), ("binary", 1)]
)
def test_a_whole_tile_takes_the_bits_it_says(name, bits):
    fmt = FORMATS[name]
    assert fmt.bits_per_weight == bits
    assert fmt.nbytes(1600, 1600) * 8 == bits * 1600 * 1600


def test_row_block_is_the_layout_of_transformers():
    # The docstring example of transformers' pack_weights: field i of byte [r, c] holds row i * R + r, plus one.
    codes = np.array([[0, 1], [-1, 0], [1, -1], [0, 0], [1, 1], [-1, 0], [0, -1], [1, 1]], np.int8)
    packed = spec.pack(spec.ROW_BLOCK, codes)
    for r in range(2):
        for c in range(2):
            assert packed[r, c] == sum((int(codes[2 * i + r, c]) + 1) << (2 * i) for i in range(4))


@pytest.mark.parametrize(("name", "step"), [("i2", 4), ("base3", 3)])
def test_a_tile_byte_holds_columns_four_apart_of_one_row(name, step):
    fmt = FORMATS[name]
    codes = np.zeros((16, fmt.col_multiple), np.int8)
    codes[5, 4 * 2 + 3] = 1
    changed = np.argwhere(spec.pack(fmt, codes) != spec.pack(fmt, np.zeros_like(codes)))
    np.testing.assert_array_equal(changed, [[0, 0, 4 * 5 + 3]])
    difference = spec.pack(fmt, codes).astype(int) - spec.pack(fmt, np.zeros_like(codes))
    assert difference.max() == step**2


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 40), st.integers(1, 70), st.randoms(use_true_random=False))
def test_round_trip_of_any_shape(name, rows, cols, random):
    fmt = FORMATS[name]
    codes = np.array([random.choice(fmt.codes) for _ in range(rows * cols)], np.int8).reshape(rows, cols)
    np.testing.assert_array_equal(spec.unpack(fmt, spec.pack(fmt, codes), rows, cols), codes)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: spec.pack(spec.I2, np.full((2, 2), 2)), r"\[pack\] codes of 'i2' must be among \(-1, 0, 1\); got 2"),
        (lambda: spec.pack(spec.BINARY, np.zeros((1, 8))), r"codes of 'binary' must be among \(-1, 1\); got 0"),
        (lambda: spec.pack(spec.I2, np.zeros((0, 2))), r"at least one row and column; got shape \(0, 2\)"),
        (lambda: spec.unpack(spec.ROW_BLOCK, np.full((1, 1), 0xFF), 4, 1), r"digits of 'row_block' are below 3; got 3"),
        (lambda: spec.unpack(spec.BASE3, np.full((1, 1, 64), 243), 16, 20), r"bytes of 'base3' are below 243; got 243"),
        (lambda: spec.unpack(spec.I2, np.zeros(63), 16, 16), r"16 x 16 weights in 'i2' take 64 bytes; got 63"),
    ],
)
def test_errors_name_the_rule(call, text):
    with pytest.raises(ThriftyError, match=text):
        call()
