"""Ternary codes as Keras files hold them: five base-3 digits a byte, row after row, 1.6 bits a weight."""

import numpy as np

from thrifty import spec
from thrifty.errors import ThriftyError

_PER_BYTE = spec.BASE3_ROW.codes_per_byte
#: The five codes of each byte.
_CODES = spec.unpack(spec.BASE3_ROW, np.arange(3**_PER_BYTE, dtype=np.uint8), 1, 3**_PER_BYTE * _PER_BYTE).reshape(
    -1, _PER_BYTE
)


def encode(codes: np.ndarray) -> np.ndarray:
    """Bytes uint8 [ceil(n / 5)] of n codes, as `thrifty.spec.pack(BASE3_ROW, codes.reshape(1, n))`.

    codes: int8 of any shape, each -1, 0 or 1.
    """
    digits = np.ones(spec.BASE3_ROW.padded(1, codes.size)[1], np.uint8)
    digits[: codes.size] = codes.reshape(-1) + 1
    places = digits.reshape(-1, _PER_BYTE).T
    packed = places[-1].copy()
    for place in places[-2::-1]:
        packed *= 3
        packed += place
    return packed


def decode(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Codes int8 of a shape from bytes that `encode` made.

    Raises ThriftyError where the byte count does not fit the shape, or a byte stands for no five codes.
    """
    count = shape[0] * shape[1]
    if packed.dtype != np.uint8 or packed.shape != (spec.BASE3_ROW.nbytes(1, count),):
        raise ThriftyError(
            f"[base3] {shape[0]} x {shape[1]} codes take {spec.BASE3_ROW.nbytes(1, count)} bytes; got "
            f"{packed.dtype} {packed.shape}; the file is damaged, or belongs to a layer of another size"
        )
    if packed.size and packed.max() >= len(_CODES):
        raise ThriftyError(f"[base3] bytes are below {len(_CODES)}; got {packed.max()}; the file is damaged")
    return _CODES.take(packed, axis=0).reshape(-1)[:count].reshape(shape)
