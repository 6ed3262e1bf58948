"""ternary_matmul on a matrix whose bytes someone else owns (a torch buffer, say)."""

import numpy as np

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.native._library import FORMAT_IDS, load
from thrifty.native._threads import default_threads


def ternary_matmul(
    fmt: str,
    packed: np.ndarray,
    rows: int,
    x_codes: np.ndarray,
    x_scales: np.ndarray,
    w_scale: float,
    bias: np.ndarray | None = None,
    n_threads: int | None = None,
) -> np.ndarray:
    """y = float32(x_codes . w^T) * (x_scale * w_scale) + bias, as `thrifty.spec.ternary_matmul` bit for bit.

    packed: uint8, contiguous, in layout fmt ('i2' or 'base3'); x_codes: int8 [n, cols]; x_scales: float32 [n]; bias:
    float32 [rows] or None. Returns float32 [n, rows]. `PackedMatrix.matmul` is the same for a matrix that owns bytes.
    Raises ThriftyError where the byte count does not fit the shape.
    """
    n, cols = x_codes.shape
    record = spec.FORMATS[fmt]
    if packed.size != record.nbytes(rows, cols) or packed.dtype != np.uint8 or not packed.flags.c_contiguous:
        raise ThriftyError(
            f"[ternary_matmul] {rows} x {cols} weights in '{fmt}' take {record.nbytes(rows, cols)} contiguous bytes;"
            f" got {packed.dtype} {packed.shape}"
        )
    library = load()
    if library is None:
        codes = spec.unpack(record, packed, rows, cols)
        return spec.ternary_matmul(x_codes, x_scales, codes, np.float32(w_scale), bias)
    width = record.padded(rows, cols)[1]
    x = np.ascontiguousarray(x_codes, np.int8)
    if width != cols:
        x = np.zeros((n, width), np.int8)
        x[:, :cols] = x_codes
    x_scales, scale = np.ascontiguousarray(x_scales, np.float32), np.asarray([w_scale], np.float32)
    bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
    y = np.empty((n, rows), np.float32)
    status = library.ternary_matmul(
        *(FORMAT_IDS[fmt], packed.ctypes.data, rows, cols, scale.ctypes.data, 1),
        *(None if bias is None else bias.ctypes.data, x.ctypes.data, width, x_scales.ctypes.data, n, y.ctypes.data),
        default_threads() if n_threads is None else n_threads,
    )
    library.check("ternary_matmul", status)
    return y
