"""The intervals of a dynamic mask over numpy arrays."""

import numpy as np

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.native._library import load
from thrifty.native._threads import default_threads


def kept_until(scores: np.ndarray, window: int, n_threads: int | None = None) -> np.ndarray:
    """e_j: the first query position at which `window` better keys precede it, S where there is none, for each head.

    scores: float32 [heads, S], contiguous. Returns int64 [heads, S], as `thrifty.spec.kept_until` does for a head, in
    O(S log window). Raises ThriftyError for a window below 1, other dtypes and shapes.
    """
    if window < 1:
        raise ThriftyError(f"[kept_until] window must be at least 1; got {window}; None keeps every key")
    if scores.dtype != np.float32 or scores.ndim != 2 or not scores.flags.c_contiguous:
        raise ThriftyError(
            f"[kept_until] scores must be contiguous float32 [heads, S]; got {scores.dtype} {scores.shape}"
        )
    heads, S = scores.shape
    library, ends = load(), np.empty((heads, S), np.int64)
    if library is None:
        for head, row in zip(scores, ends, strict=True):
            row[:] = spec.kept_until(head, window)
        return ends
    scratch = np.empty((heads, min(window, S)), np.uint64)
    threads = default_threads() if n_threads is None else n_threads
    status = library.kept_until(*(scores.ctypes.data, heads, S, window, scratch.ctypes.data, ends.ctypes.data, threads))
    library.check("kept_until", status)
    return ends
