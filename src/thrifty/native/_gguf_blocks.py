"""Blocks of GGUF files over numpy arrays."""

import numpy as np

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.native._library import aligned_empty, load
from thrifty.native._threads import default_threads

#: Numbers of the types in the C interface.
KIND_IDS = {"TQ1_0": 0, "TQ2_0": 1, "I2_S": 2}
#: Number of a dtype of values; uint16 holds the bits of bfloat16.
_VALUE_IDS = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}


def gguf_encode(kind: str, codes: np.ndarray, scale: float, n_threads: int | None = None) -> np.ndarray:
    """Bytes of weights codes * scale, as `thrifty.spec.gguf_encode` bit for bit.

    kind: 'TQ1_0', 'TQ2_0' or 'I2_S'; codes: int8 [rows, cols]. Returns uint8 [bytes].
    Raises ThriftyError where a code, the scale or the columns do not fit.
    """
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.size == 0:
        raise ThriftyError(f"[gguf_encode] codes must be int8 [rows, cols], neither 0; got {codes.dtype} {codes.shape}")
    library = load()
    if library is None or kind not in KIND_IDS or codes.shape[1] % spec.GGUF_BLOCKS[kind].weights:
        return spec.gguf_encode(kind, codes, scale)
    rows, cols = codes.shape
    codes, data = np.ascontiguousarray(codes), aligned_empty(spec.GGUF_BLOCKS[kind].nbytes(rows, cols))
    numbers = KIND_IDS[kind], codes.ctypes.data, rows, cols, scale, data.ctypes.data, _threads(n_threads)
    if library.gguf_encode(*numbers) != 0:
        return spec.gguf_encode(kind, codes, scale)  # says what is wrong
    return data


def gguf_decode(
    kind: str, data: np.ndarray, rows: int, cols: int, n_threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [rows, cols] and the distinct scales that multiply them, as `thrifty.spec.gguf_decode` bit for bit.

    data: uint8 [bytes], of one type. Raises ThriftyError where its size, a digit or a scale is wrong.
    """
    library = load()
    if library is None or kind not in KIND_IDS or rows < 1 or data.size != spec.GGUF_BLOCKS[kind].nbytes(rows, cols):
        return spec.gguf_decode(kind, data, rows, cols)
    data = np.ascontiguousarray(data, np.uint8)
    codes = aligned_empty(rows * cols).view(np.int8).reshape(rows, cols)
    scales = np.empty(1 if kind == "I2_S" else rows * cols // spec.GGUF_BLOCKS[kind].weights, np.float32)
    addresses = codes.ctypes.data, scales.ctypes.data
    if library.gguf_decode(KIND_IDS[kind], data.ctypes.data, rows, cols, *addresses, _threads(n_threads)) != 0:
        return spec.gguf_decode(kind, data, rows, cols)  # says what is wrong
    first = scales.max()
    if ((scales == first) | (scales == 0)).all():  # spares a sort
        scales = scales[:1] * 0 + first
    return codes, np.unique(scales[scales != 0])


def quantize_q8_0(values: np.ndarray, n_threads: int | None = None) -> np.ndarray:
    """Q8_0 of values, as `thrifty.spec.quantize_q8_0` bit for bit: uint8 [rows, row bytes].

    values: [rows, cols], float32, float16, or uint16 that are the bits of bfloat16; cols a multiple of 32.
    Raises ThriftyError where a value is not finite, or too large for a float16 scale.
    """
    if values.dtype not in _VALUE_IDS or values.ndim != 2 or values.size == 0:
        raise ThriftyError(
            "[quantize_q8_0] values must be float32, float16 or bits of bfloat16 [rows, cols], neither 0;"
            f" got {values.dtype} {values.shape}"
        )
    rows, cols = values.shape
    library, size = load(), spec.Q8_0.nbytes(rows, cols)
    if library is not None:
        values, data = np.ascontiguousarray(values), aligned_empty(size)
        numbers = values.ctypes.data, _VALUE_IDS[values.dtype], rows, cols, data.ctypes.data, _threads(n_threads)
        if library.quantize_q8_0(*numbers) == 0:
            return data.reshape(rows, -1)
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return spec.quantize_q8_0(values.astype(np.float32, copy=False))


def dequantize_q8_0(data: np.ndarray, rows: int, cols: int, n_threads: int | None = None) -> np.ndarray:
    """Values float32 [rows, cols] of Q8_0, as `thrifty.spec.dequantize_q8_0` bit for bit.

    Raises ThriftyError where the byte count does not fit the shape.
    """
    library = load()
    if library is None or rows < 1 or data.size != spec.Q8_0.nbytes(rows, cols):
        return spec.dequantize_q8_0(data, rows, cols)
    data = np.ascontiguousarray(data, np.uint8)
    values = aligned_empty(4 * rows * cols).view(np.float32).reshape(rows, cols)
    status = library.dequantize_q8_0(data.ctypes.data, rows, cols, values.ctypes.data, _threads(n_threads))
    library.check("dequantize_q8_0", status)
    return values


def _threads(n_threads: int | None) -> int:
    return default_threads() if n_threads is None else n_threads
