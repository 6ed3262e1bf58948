import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from thrifty import native, spec
from thrifty.errors import ThriftyError
from thrifty.native import PackedMatrix, _library

UGLY = (1, 3, 63, 257, 500)
#: One row, every remainder of a group of eight, and more rows than one chunk of 64.
TOKENS = (1, 2, 3, 5, 9, 15, 67)
#: Rows of x, rows and columns: registers, blocks and chunks of many rows, full or not.
MANY = (
    *((5, 50, 70), (8, 17, 641), (13, 33, 1300)),
    *((16, 257, 500), (17, 63, 1300), (31, 1, 3), (32, 48, 640), (33, 50, 641)),
    *((100, 40, 63), (256, 16, 1280), (257, 37, 700), (600, 33, 257)),
)


def operands(rng: np.random.Generator, rows: int, cols: int, n: int):
    w = rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    x = rng.integers(-127, 128, (n, cols)).astype(np.int8)
    return w, x, rng.uniform(1e-4, 2, n).astype(np.float32)


def multiply(w, x, x_scales, w_scale, fmt, bias=None, **options):
    out = np.full((len(x), len(w)), np.nan, np.float32)
    y = PackedMatrix.from_codes(w, fmt).matmul(x, x_scales, w_scale, bias, out=out, **options)
    assert y is out
    return y


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
@pytest.mark.parametrize("rows", UGLY)
@pytest.mark.parametrize("cols", UGLY)
def test_equals_the_spec(implementation, rng, fmt, rows, cols):
    for n in TOKENS:
        w, x, x_scales = operands(rng, rows, cols, n)
        bias = rng.standard_normal(rows).astype(np.float32) if n % 2 else None
        w_scale = rng.uniform(0.01, 2, rows).astype(np.float32) if n % 3 else 0.375
        expected = spec.ternary_matmul(x, x_scales, w, w_scale, bias)
        np.testing.assert_array_equal(multiply(w, x, x_scales, w_scale, fmt, bias), expected)


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
@pytest.mark.parametrize(("n", "rows", "cols"), MANY)
def test_many_rows_equal_the_spec(implementation, rng, fmt, n, rows, cols):
    w, x, x_scales = operands(rng, rows, cols, n)
    bias, w_scale = rng.standard_normal(rows).astype(np.float32), rng.uniform(0.01, 2, rows).astype(np.float32)
    expected = spec.ternary_matmul(x, x_scales, w, w_scale, bias)
    for n_threads in (1, 2, 3, 7):
        y = multiply(w, x, x_scales, w_scale, fmt, bias, n_threads=n_threads)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
@pytest.mark.parametrize("weight", [-1, 0, 1])
@pytest.mark.parametrize("activation", [-128, -127, 0, 127])
def test_saturated_rows_do_not_overflow(implementation, fmt, weight, activation):
    for cols in (64, 1023, 5000):
        w = np.full((17, cols), weight, np.int8)
        x = np.full((5, cols), activation, np.int8)
        y = multiply(w, x, np.ones(5, np.float32), 1.0, fmt)
        assert (y == cols * weight * activation).all()


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
def test_the_longest_row_does_not_overflow(implementation, fmt):
    cols = 2**18
    for n, weight, activation in (
        (1, -1, -128),
        (1, -1, 127),
        (1, 1, -128),
        (1, 1, 127),
        (17, -1, -128),
        (17, 1, -128),
    ):
        w, x = np.full((1, cols), weight, np.int8), np.full((n, cols), activation, np.int8)
        assert (multiply(w, x, np.ones(n, np.float32), 1.0, fmt) == np.float32(cols * weight * activation)).all()


@pytest.mark.parametrize("fmt", ["i2", "base3", "row_block", "i8", "i4"])
def test_more_columns_than_sums_hold_are_refused(implementation, fmt):
    most = _library.MOST_COLS[fmt]
    with pytest.raises(
        ThriftyError, match=rf"\[pack\] .*'{fmt}' .* at most {most} columns.*; got {most + 1}; split it"
    ):
        native.pack(fmt, np.zeros((1, most + 1), np.int8))
    with pytest.raises(ThriftyError, match=rf"\[unpack\] .* got {most + 1}"):
        native.unpack(fmt, np.zeros(4, np.uint8), 1, most + 1)
    # Sums of the format's largest codes, at the limit.
    if fmt != "row_block":
        largest = spec.FORMATS[fmt].codes[-1]
        w, x = np.full((1, most), largest, np.int8), np.full((1, most), -128, np.int8)
        assert multiply(w, x, np.ones(1, np.float32), 1.0, fmt) == np.float32(-128 * largest * most)


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
def test_every_byte_decodes(implementation, fmt):
    """All combinations of digits in a byte, in every position of a block: activations tell them apart."""
    width = 4 * spec.FORMATS[fmt].codes_per_byte
    digits = np.stack(np.meshgrid(*[[-1, 0, 1]] * (width // 4), indexing="ij"), -1).reshape(-1, width // 4)
    for position in range(4):
        w = np.zeros((len(digits), width), np.int8)
        w[:, position::4] = digits
        x = np.zeros((3, width), np.int8)
        x[:, position::4] = 3 ** np.arange(width // 4)
        y = multiply(w, x, np.ones(3, np.float32), 1.0, fmt)
        np.testing.assert_array_equal(y, np.tile((digits * 3 ** np.arange(width // 4)).sum(1), (3, 1)))


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
@pytest.mark.parametrize("n", [1, 11])
def test_thread_counts_agree(implementation, rng, fmt, n):
    w, x, x_scales = operands(rng, 1003, 2100, n)
    expected = spec.ternary_matmul(x, x_scales, w, 0.5)
    for n_threads in (1, 2, 3, 7):
        for _ in range(3):
            np.testing.assert_array_equal(multiply(w, x, x_scales, 0.5, fmt, n_threads=n_threads), expected)


def test_concurrent_callers_do_not_meet(rng):
    w, x, x_scales = operands(rng, 800, 1200, 3)
    matrix, expected = PackedMatrix.from_codes(w), spec.ternary_matmul(x, x_scales, w, 0.5)
    wrong = []

    def call():
        for _ in range(30):
            if not np.array_equal(matrix.matmul(x, x_scales, 0.5, n_threads=3), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


FORK = """
import os, numpy as np
from thrifty.native import PackedMatrix
w = np.ones((2000, 2000), np.int8)
matrix, x, one = PackedMatrix.from_codes(w), np.ones((1, 2000), np.int8), np.ones(1, np.float32)
assert (matrix.matmul(x, one, 1.0, n_threads=4) == 2000).all()
child = os.fork()
ok = all((matrix.matmul(x, one, 1.0, n_threads=4) == 2000).all() for _ in range(20))
if child == 0:
    os._exit(0 if ok else 1)
assert ok and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_child_of_fork_multiplies():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
def test_padded_rows_of_x_are_read_in_place(implementation, rng, fmt):
    w, x, x_scales = operands(rng, 40, 33, 4)
    padded = np.zeros((4, 80), np.int8)
    padded[:, :33] = x
    y = PackedMatrix.from_codes(w, fmt).matmul(padded, x_scales, 2.0)
    np.testing.assert_array_equal(y, spec.ternary_matmul(x, x_scales, w, 2.0))


@pytest.mark.skipif(not native.available(), reason="addresses need the native library")
def test_a_failure_between_addresses_tells_the_status():
    matrix, x, one = (
        PackedMatrix.from_codes(np.ones((3, 16), np.int8)),
        np.ones((1, 16), np.int8),
        np.ones(3, np.float32),
    )
    y = np.empty(3, np.float32)
    arguments = (x.ctypes.data, 16, one.ctypes.data, 1, one.ctypes.data)
    with pytest.raises(ThriftyError, match=r"\[ternary_matmul\] a shape, stride or pointer is out of range"):
        matrix.matmul_into(*arguments, 2, None, y.ctypes.data)
    matrix.matmul_into(*arguments, 3, None, y.ctypes.data)
    assert (y == 16).all()


@pytest.mark.skipif(not native.available(), reason="addresses need the native library")
@pytest.mark.parametrize("rows", [1, 17, 257])
def test_nothing_is_written_beside_y(guarded, rng, rows):
    for isa in set(native.built_isas()) & set(native.detected_isas()):
        native.select_isa(isa)
        for n in (1, 9, 21):
            w, x, x_scales = operands(rng, rows, 80, n)
            y, scale = guarded((n, rows), np.float32), np.ones(1, np.float32)
            PackedMatrix.from_codes(w).matmul_into(
                x.ctypes.data, 80, x_scales.ctypes.data, n, scale.ctypes.data, 1, None, y.address
            )
            assert y.intact()
            np.testing.assert_array_equal(y.array, spec.ternary_matmul(x, x_scales, w, 1.0))
    native.select_isa(None)


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
def test_a_matrix_copies_and_pickles_through_its_codes(implementation, rng, fmt):
    w, x, x_scales = operands(rng, 33, 47, 2)
    matrix = PackedMatrix.from_codes(w, fmt)
    assert (matrix.rows, matrix.cols, matrix.format) == (33, 47, fmt)
    # numpy multiplies int8 codes.
    assert matrix.nbytes == (w.nbytes if implementation == "numpy" else spec.FORMATS[fmt].nbytes(33, 47))
    for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        np.testing.assert_array_equal(other.codes(), w)
        np.testing.assert_array_equal(other.matmul(x, x_scales, 1.0), matrix.matmul(x, x_scales, 1.0))


@pytest.mark.parametrize("fmt", native.KERNEL_FORMATS)
def test_bytes_of_another_owner(implementation, rng, fmt):
    w, x, x_scales = operands(rng, 33, 47, 3)
    bias = rng.standard_normal(33).astype(np.float32)
    packed = native.pack(fmt, w).copy()
    y = native.ternary_matmul(fmt, packed, 33, x, x_scales, 0.25, bias)
    np.testing.assert_array_equal(y, spec.ternary_matmul(x, x_scales, w, 0.25, bias))
    with pytest.raises(ThriftyError, match="contiguous bytes"):
        native.ternary_matmul(fmt, packed[:-1], 33, x, x_scales, 0.25)


def test_no_rows_of_x(implementation, rng):
    w, x, x_scales = operands(rng, 5, 6, 0)
    assert PackedMatrix.from_codes(w).matmul(x, x_scales, 1.0).shape == (0, 5)


def test_wrong_arguments_are_named(implementation, rng):
    w, x, x_scales = operands(rng, 20, 30, 2)
    matrix = PackedMatrix.from_codes(w)
    with pytest.raises(ThriftyError, match=r"\[ternary_matmul\] x_codes must be contiguous int8 \[n, 30\]"):
        matrix.matmul(x.astype(np.float32), x_scales, 1.0)
    with pytest.raises(ThriftyError, match="must have 30 columns"):
        matrix.matmul(np.zeros((2, 31), np.int8), x_scales, 1.0)
    with pytest.raises(ThriftyError, match="x_scales must be"):
        matrix.matmul(x, x_scales[:1], 1.0)
    with pytest.raises(ThriftyError, match="w_scale must be"):
        matrix.matmul(x, x_scales, np.ones(7, np.float32))
    with pytest.raises(ThriftyError, match="bias must be"):
        matrix.matmul(x, x_scales, 1.0, np.ones(7, np.float32))
    with pytest.raises(ThriftyError, match="out must be"):
        matrix.matmul(x, x_scales, 1.0, out=np.empty((20, 2), np.float32).T)
    with pytest.raises(ThriftyError, match="format must be one of i2, base3"):
        PackedMatrix.from_codes(w, "row_block")
    with pytest.raises(ThriftyError, match=r"\[pack\]"):
        PackedMatrix.from_codes(w * 2 + 1)
    with pytest.raises(ThriftyError, match="take 128 contiguous bytes"):
        PackedMatrix(np.zeros(3, np.uint8), 20, 10, "i2")
