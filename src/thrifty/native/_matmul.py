"""ternary_matmul on a matrix whose bytes someone else owns (a torch buffer, say)."""

import numpy as np

from thrifty.native._packed import PackedMatrix


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
