"""ternary_matmul on a matrix whose bytes someone else owns (a torch buffer, say)."""

import numpy as np

from thrifty.errors import ThriftyError
from thrifty.native._library import FORMAT_IDS, load
from thrifty.native._packed import PackedMatrix
from thrifty.native._threads import default_threads


def ternary_matmul(
    fmt: str,
    packed: np.ndarray,
    rows: int,
    x_codes: np.ndarray,
    x_scales: np.ndarray,
    w_scale: float | np.ndarray,
    bias: np.ndarray | None = None,
    n_threads: int | None = None,
) -> np.ndarray:
    """y = float32(x_codes . w^T) * (x_scale * w_scale) + bias, as `thrifty.spec.ternary_matmul` bit for bit.

    packed: uint8, contiguous, in layout fmt ('i2' or 'base3'); x_codes: int8 [n, cols]; x_scales: float32 [n]; w_scale:
    a number or float32 [rows]; bias: float32 [rows] or None. Returns float32 [n, rows]. `PackedMatrix.matmul` is the
    same for a matrix that owns its bytes. Raises ThriftyError where the byte count does not fit the shape.
    """
    bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
    x_codes, x_scales = np.ascontiguousarray(x_codes, np.int8), np.ascontiguousarray(x_scales, np.float32)
    matrix = PackedMatrix(packed, rows, x_codes.shape[1], fmt)
    return matrix.matmul(x_codes, x_scales, w_scale, bias, n_threads)


def ternary_matmul_into(
    fmt: str,
    packed: int,
    rows: int,
    cols: int,
    w_scale: int,
    bias: int | None,
    x: int,
    x_stride: int,
    x_scales: int,
    n: int,
    y: int,
    n_threads: int | None = None,
) -> None:
    """`ternary_matmul` between addresses (`array.ctypes.data`, `tensor.data_ptr()`), nothing checked but sizes.

    w_scale: of one float32; x: int8 [n, x_stride], zero from cols to the format's padded columns. Needs the native
    library.
    """
    library = load()
    if library is None:
        raise ThriftyError(
            "[ternary_matmul] addresses need the native library; install with a compiler, or pass arrays"
        )
    threads = default_threads() if n_threads is None else n_threads
    status = library.ternary_matmul(
        FORMAT_IDS[fmt], packed, rows, cols, w_scale, 1, bias, x, x_stride, x_scales, n, y, threads
    )
    library.check("ternary_matmul", status)
