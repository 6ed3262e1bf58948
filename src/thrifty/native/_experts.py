"""Retrieval by product keys, and the experts retrieved."""

from typing import Any

import numpy as np

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.native._library import load
from thrifty.native._step import ACTIVATION_IDS, DTYPE_IDS
from thrifty.native._threads import default_threads

#: Most experts of a row that the library chooses (csrc/include/thrifty.h).
MOST_CHOSEN = 512
MOST_KEYS = 65536


def product_key_topk(
    x: np.ndarray, y: np.ndarray, k: int, n_threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of all sums x_i + y_j of each row, best first, and their numbers i n + j, as `thrifty.spec` has them.

    x, y: float32 [rows, n], each row contiguous; k <= n^2. Returns float32 and int64 [rows, k].
    """
    library = load()
    rows, n = x.shape
    if library is None or k > MOST_CHOSEN or n > MOST_KEYS:
        return spec.product_key_topk(x, y, k)
    if y.shape != x.shape or not _is_rows(x) or not _is_rows(y):
        raise ThriftyError(f"[product_key_topk] x and y must be float32 [rows, n]; got {x.dtype} {x.shape}, {y.shape}")
    sums, numbers = np.empty((rows, k), np.float32), np.empty((rows, k), np.int64)
    status = library.product_key_topk(
        *(x.ctypes.data, x.strides[0] // 4, y.ctypes.data, y.strides[0] // 4, rows, n, k),
        *(sums.ctypes.data, numbers.ctypes.data, default_threads() if n_threads is None else n_threads),
    )
    library.check("product_key_topk", status)
    return sums, numbers


def product_key_experts(
    x: np.ndarray | None,
    indices: np.ndarray,
    weights: np.ndarray | None,
    down: np.ndarray | None,
    up: np.ndarray | None,
    act: str = "relu",
    dtype: str = "F32",
    n_threads: int | None = None,
) -> tuple[Any, Any]:
    """hidden_k = x . d_k and y = sum_k w_k act(hidden_k) u_k, as `thrifty.spec.product_key_experts`, in one pass.

    x: float32 [n, d]; indices: int64 [n, k]; weights: float32 [n, k]; down, up: [experts, d], float32, or the 16-bit
    floats that `dtype` names ("BF16", "F16") as any array of two bytes. All contiguous. Without `up` only hidden is
    computed (y is None); without `down`, y = sum_k w_k u_k (hidden is None). Needs the native library. Raises
    ThriftyError where shapes or experts' numbers do not fit.
    """
    library = load()
    if library is None:
        raise ThriftyError("[product_key_experts] there is no native library; install with a C++ compiler")
    given = [table for table in (down, up) if table is not None]
    (n, k), (experts, d) = indices.shape, given[0].shape
    arrays = ((x, (n, d), np.float32), (indices, (n, k), np.int64), (weights, (n, k), np.float32))
    tables = tuple((table, (experts, d), None) for table in given)
    for array, shape, wanted in arrays + tables:
        if array is None:
            continue
        if array.shape != shape or not array.flags.c_contiguous or (wanted is not None and array.dtype != wanted):
            raise ThriftyError(
                f"[product_key_experts] arrays must be contiguous and fit; got {array.dtype} {array.shape} for {shape}"
            )
    hidden = None if down is None else np.empty((n, k), np.float32)
    y = None if up is None else np.empty((n, d), np.float32)
    status = library.product_key_experts(
        *(_address(x), _address(indices), _address(weights), _address(down), _address(up), DTYPE_IDS[dtype]),
        *(ACTIVATION_IDS[act], n, k, d, experts, _address(hidden), _address(y)),
        default_threads() if n_threads is None else n_threads,
    )
    if status == 1 and n * k and (indices.min() < 0 or indices.max() >= experts):
        raise ThriftyError(
            f"[product_key_experts] experts' numbers must be 0 to {experts - 1}; got {indices.min()} to {indices.max()}"
        )
    library.check("product_key_experts", status)
    return hidden, y


def _is_rows(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and array.ndim == 2 and (array.shape[1] == 1 or array.strides[1] == 4)


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data
