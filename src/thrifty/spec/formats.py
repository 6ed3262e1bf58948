"""Number formats of low-bit weight matrices: frozen records, and pack and unpack as index arithmetic."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from thrifty.errors import ThriftyError


@dataclass(frozen=True)
class Format:
    """How a matrix of weight codes [rows, cols] becomes bytes. Sizes and error texts derive from these fields."""

    #: Name used in options, errors and the C interface.
    name: str
    #: Distinct code values, in the order of their stored digits.
    codes: tuple[int, ...]
    #: Codes in a byte; digit f is worth `len(codes) ** f`, or `4 ** f` where `digit_bits` is 2.
    codes_per_byte: int
    #: Bits of a digit, or None where digits are in base `len(codes)`.
    digit_bits: int | None
    #: "tile": tiles of 16 rows, a linear stream of 64-byte blocks, one dword per row (kernels).
    #: "row_block": the digits of a byte are rows r, R + r, 2R + r, ... (Hugging Face). "row": along a row.
    layout: Literal["tile", "row_block", "row"]

    @property
    def radix(self) -> int:
        """Worth of one digit step in a byte."""
        return len(self.codes) if self.digit_bits is None else 2**self.digit_bits

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes when no padding is needed."""
        return 8 / self.codes_per_byte

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this."""
        return {"tile": TILE_ROWS, "row_block": self.codes_per_byte, "row": 1}[self.layout]

    @property
    def col_multiple(self) -> int:
        """Columns are padded to a multiple of this."""
        return {"tile": 4 * self.codes_per_byte, "row_block": 1, "row": self.codes_per_byte}[self.layout]

    def padded(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape [rows, cols] with padding."""
        return -(-rows // self.row_multiple) * self.row_multiple, -(-cols // self.col_multiple) * self.col_multiple

    def packed_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape of the uint8 array that holds a [rows, cols] matrix."""
        padded_rows, padded_cols = self.padded(rows, cols)
        if self.layout == "tile":
            return padded_rows // TILE_ROWS, padded_cols // self.col_multiple, TILE_ROWS * 4
        if self.layout == "row_block":
            return padded_rows // self.codes_per_byte, cols
        return rows, padded_cols // self.codes_per_byte

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a [rows, cols] matrix, padding included."""
        return int(np.prod(self.packed_shape(rows, cols)))


#: Rows of a kernel tile: one row per 32-bit lane of a 512-bit register.
TILE_ROWS = 16

#: Two bits a weight, as the kernels stream it.
I2 = Format("i2", (-1, 0, 1), 4, 2, "tile")
#: Five base-3 digits a byte (1.6 bits a weight), as the kernels stream it.
BASE3 = Format("base3", (-1, 0, 1), 5, None, "tile")
#: Five base-3 digits a byte along a row, as Keras files hold a matrix of one row.
BASE3_ROW = Format("base3_row", (-1, 0, 1), 5, None, "row")
#: transformers' BitNet checkpoint layout (`integrations/bitnet.py`): two bits, four row blocks a byte.
ROW_BLOCK = Format("row_block", (-1, 0, 1), 4, 2, "row_block")
#: One bit a weight, columns least significant bit first; a set bit is +1.
BINARY = Format("binary", (-1, 1), 8, 1, "row")

#: A byte, or half a byte, a weight with a scale per row: output heads, as the kernels stream them.
I8 = Format("i8", tuple(range(-127, 128)), 1, 8, "tile")
I4 = Format("i4", tuple(range(-7, 8)), 2, 4, "tile")

FORMATS = {f.name: f for f in (I2, BASE3, BASE3_ROW, ROW_BLOCK, BINARY, I8, I4)}


def pack(fmt: Format, codes: np.ndarray) -> np.ndarray:
    """Bytes of weight codes: byte = sum_f digit_f * radix^f, digit = index of the code in `fmt.codes`.

    codes: int8 [rows, cols]. Returns uint8 of `fmt.packed_shape(rows, cols)`; padding holds code 0 (binary: -1).
    In a tile, byte 4 * lane + j of block c holds row `lane`, and digit f of it column 4 * n * c + 4 * f + j, where n is
    the number of codes in a byte: one dword is four adjacent columns of one row, so a block meets a broadcast dword of
    activations per digit.
    Raises ThriftyError where a code is not one of `fmt.codes`.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.size == 0:
        raise ThriftyError(f"[pack] codes must be a matrix with at least one row and column; got shape {codes.shape}")
    if not np.isin(codes, fmt.codes).all():
        wrong = codes[~np.isin(codes, fmt.codes)][0]
        raise ThriftyError(f"[pack] codes of '{fmt.name}' must be among {fmt.codes}; got {wrong}")
    rows, cols = codes.shape
    padded_rows, padded_cols = fmt.padded(rows, cols)
    digits = np.full((padded_rows, padded_cols), fmt.codes.index(0) if 0 in fmt.codes else 0, np.int64)
    digits[:rows, :cols] = np.searchsorted(fmt.codes, codes)
    worth = fmt.radix ** np.arange(fmt.codes_per_byte)
    return np.tensordot(_split(fmt, digits), worth, axes=(-1, 0)).astype(np.uint8).reshape(fmt.packed_shape(rows, cols))


def unpack(fmt: Format, packed: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Weight codes int8 [rows, cols] of bytes made by `pack`.

    Raises ThriftyError where the byte count does not fit the shape or a digit stands for no code.
    """
    packed = np.asarray(packed, np.uint8)
    if packed.size != fmt.nbytes(rows, cols):
        raise ThriftyError(
            f"[unpack] {rows} x {cols} weights in '{fmt.name}' take {fmt.nbytes(rows, cols)} bytes; got {packed.size}"
        )
    digits = packed.reshape(-1, 1).astype(np.int64) // fmt.radix ** np.arange(fmt.codes_per_byte)
    if fmt.digit_bits is not None:
        digits %= fmt.radix
    elif (packed >= fmt.radix**fmt.codes_per_byte).any():
        raise ThriftyError(
            f"[unpack] bytes of '{fmt.name}' are below {fmt.radix**fmt.codes_per_byte}; got {packed.max()}"
        )
    else:
        digits %= fmt.radix
    if (digits >= len(fmt.codes)).any():
        raise ThriftyError(f"[unpack] digits of '{fmt.name}' are below {len(fmt.codes)}; got {digits.max()}")
    return np.asarray(fmt.codes, np.int8)[_join(fmt, digits, rows, cols)[:rows, :cols]]


def _split(fmt: Format, digits: np.ndarray) -> np.ndarray:
    """Digits [padded rows, padded cols] in the order of bytes, the digits of a byte last."""
    rows, cols = digits.shape
    n = fmt.codes_per_byte
    if fmt.layout == "tile":  # [tile, lane, block, f, j] -> [tile, block, lane, j, f]
        return digits.reshape(rows // TILE_ROWS, TILE_ROWS, cols // (4 * n), n, 4).transpose(0, 2, 1, 4, 3)
    if fmt.layout == "row_block":
        return digits.reshape(n, rows // n, cols).transpose(1, 2, 0)
    return digits.reshape(rows, cols // n, n)


def _join(fmt: Format, digits: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The inverse of `_split`."""
    rows, cols = fmt.padded(rows, cols)
    n = fmt.codes_per_byte
    if fmt.layout == "tile":
        tiles = digits.reshape(rows // TILE_ROWS, cols // (4 * n), TILE_ROWS, 4, n).transpose(0, 2, 1, 4, 3)
        return tiles.reshape(rows, cols)
    if fmt.layout == "row_block":
        return digits.reshape(rows // n, cols, n).transpose(2, 0, 1).reshape(rows, cols)
    return digits.reshape(rows, cols)
