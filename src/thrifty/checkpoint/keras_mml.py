"""The ternary code of Keras-MML 0.1.1 and later: one bit for the most common of -1, 0 and 1, two for the others."""

from functools import cache

import numpy as np

from thrifty.errors import ThriftyError

#: What the codes "0", "10" and "11" stand for in the header.
HEADER_SYMBOLS = (0, 1, -1)
#: Codes of a body that end in one byte are at most eight; a place of the table without one holds this.
NONE = 3
REMEDY = "the file is damaged, or of Keras-MML 0.1.0: save it again with a later version"


def decode_ternary(encoded: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Ternary codes of a bit stream: header (two codes), then "0" = most common, "10" = second, "11" = least common.

    encoded: uint8 [n], most significant bit first; the header names the most common and the second symbol by the code
    0 = "0", 1 = "10", -1 = "11". shape: of the codes, row-major. Returns int8 of that shape.
    Raises ThriftyError where the stream is empty, cut short, or holds more codes than the shape.
    Source: files of Keras-MML 0.1.1 (`kernel_encoded`). Those of 0.1.0 have no header, and most are refused.
    """
    encoded = np.asarray(encoded, np.uint8).reshape(-1)
    if encoded.size == 0:
        raise ThriftyError("[decode_ternary] an encoded array must not be empty; got 0 bytes; save the model again")
    count = int(np.prod(shape))
    rule = f"[decode_ternary] shape {tuple(map(int, shape))} takes {count} codes"
    codes = _codes(encoded)
    header, body, rest = codes[:2], codes[2 : 2 + count], codes[2 + count :]
    if body.size < count:
        raise ThriftyError(f"{rule}; got {max(codes.size - 2, 0)}; {REMEDY}")
    spare = 8 * encoded.size - 2 - count - np.count_nonzero(header) - np.count_nonzero(body)
    if header[0] == header[1] or spare > 8 or rest.size != spare or rest.any():
        raise ThriftyError(f"{rule}; the bytes hold others; {REMEDY}")
    common, second = (HEADER_SYMBOLS[code] for code in header)
    symbols = np.array([common, second, -common - second], np.int8)  # the three sum to zero
    return symbols[body].reshape(shape)


def _codes(encoded: np.ndarray) -> np.ndarray:
    """The codes of a bit stream in order: 0, 1, 2 for "0", "10", "11"; an unfinished one at the end is dropped.

    A 0 always ends a code, so a byte begins inside of one where the 1s right before it are odd in number.
    """
    ends, inside = _table()
    places = np.where(encoded == 0xFF, 0, np.arange(1, encoded.size + 1))  # eight 1s change nothing
    last = np.maximum.accumulate(places)[:-1]
    before = np.zeros(encoded.size, np.intp)
    before[1:] = np.where(last > 0, inside[encoded[last - 1]], 0)
    found = ends[before, encoded].view(np.uint8)
    return found[found != NONE]


@cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Codes that end in a byte, eight bytes as uint64 [inside, byte]; and whether it ends inside of a code [byte]."""
    ends = np.full((2, 256, 8), NONE, np.uint8)
    inside = np.zeros(256, np.intp)
    for begun in (0, 1):
        for byte in range(256):
            one = begun
            for place in range(8):
                bit = byte >> (7 - place) & 1
                if one or not bit:
                    ends[begun, byte, place] = one + bit if one else 0
                one = 0 if one else bit
            if not begun:
                inside[byte] = one
    return ends.view(np.uint64)[:, :, 0], inside
