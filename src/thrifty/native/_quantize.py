"""quantize_per_token and rms_norm over numpy arrays, and over addresses."""

import numpy as np

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.native._library import load
from thrifty.native._threads import default_threads


def quantize_per_token(
    x: np.ndarray,
    gain: np.ndarray | None = None,
    eps: float = spec.EPS,
    norm: bool = True,
    n_threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """codes = round(y * (127 / a)), scale = a / 127, a = max(max |y|, 1e-5), y = rms_norm(x, gain) or x itself.

    x: float32 [n, d], contiguous; gain: float32 [d] or None. Returns int8 [n, d] and float32 [n], as
    `thrifty.spec.quantize_per_token` does bit for bit; a row with a NaN or an infinity gets codes 0 and that value for
    a scale. Raises ThriftyError for other dtypes and shapes.
    """
    n, d = _check("quantize_per_token", x, gain)
    if load() is None:
        return _spec_quantize(x, gain, eps, norm)
    codes, scales = np.empty((n, d), np.int8), np.empty(n, np.float32)
    quantize_into(x.ctypes.data, _address(gain), eps, norm, n, d, codes.ctypes.data, d, scales.ctypes.data, n_threads)
    return codes, scales


def quantize_into(
    x: int,
    gain: int | None,
    eps: float,
    norm: bool,
    n: int,
    d: int,
    codes: int,
    stride: int,
    scales: int,
    n_threads: int | None = None,
) -> None:
    """`quantize_per_token` between addresses (`array.ctypes.data`, `tensor.data_ptr()`), nothing checked but sizes.

    x: float32 [n, d]; codes: int8 [n, stride], zeroed from d on; scales: float32 [n]. Needs the native library.
    """
    library = _required()
    threads = default_threads() if n_threads is None else n_threads
    status = library.quantize_per_token(x, gain, eps, norm, n, d, codes, stride, scales, threads)
    library.check("quantize_per_token", status)


def rms_norm(
    x: np.ndarray,
    gain: np.ndarray | None = None,
    eps: float = spec.EPS,
    n_threads: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """y = (x * r) * gain, r = 1 / sqrt(mean(x^2) + eps), as `thrifty.spec.rms_norm` bit for bit.

    x: float32 [n, d], contiguous; gain: float32 [d] or None; out: where to put y, x itself included.
    Raises ThriftyError for other dtypes and shapes.
    """
    n, d = _check("rms_norm", x, gain)
    if out is None:
        out = np.empty((n, d), np.float32)
    elif out.shape != x.shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ThriftyError(f"[rms_norm] out must be contiguous float32 {x.shape}; got {out.dtype} {out.shape}")
    library = load()
    if library is None:
        out[...] = spec.rms_norm(x, gain, eps)
        return out
    threads = default_threads() if n_threads is None else n_threads
    status = library.rms_norm(x.ctypes.data, _address(gain), eps, n, d, out.ctypes.data, threads)
    library.check("rms_norm", status)
    return out


def _required():
    library = load()
    if library is None:
        raise ThriftyError("[native] addresses need the native library; install with a C++ compiler, or pass arrays")
    return library


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _check(op: str, x: np.ndarray, gain: np.ndarray | None) -> tuple[int, int]:
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] == 0 or not x.flags.c_contiguous:
        raise ThriftyError(f"[{op}] x must be contiguous float32 [n, d]; got {x.dtype} {x.shape}")
    n, d = x.shape
    if gain is not None and (gain.dtype != np.float32 or gain.shape != (d,) or not gain.flags.c_contiguous):
        raise ThriftyError(f"[{op}] gain must be contiguous float32 ({d},); got {gain.dtype} {gain.shape}")
    return n, d


def _spec_quantize(x: np.ndarray, gain: np.ndarray | None, eps: float, norm: bool) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(all="ignore"):
        y = spec.rms_norm(x, gain, eps) if norm else x
        largest = np.abs(y).max(-1)
        bad = ~np.isfinite(largest)
        codes, scales = spec.quantize_per_token(np.where(bad[:, None], np.float32(0), y), norm=False)
        return codes, np.where(bad, largest, scales)
