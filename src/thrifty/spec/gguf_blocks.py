"""Blocks of GGUF files: ternary codes with their scale (TQ1_0, TQ2_0, I2_S) and 8-bit floats (Q8_0)."""

from dataclasses import dataclass

import numpy as np

from thrifty.errors import ThriftyError


@dataclass(frozen=True)
class BlockFormat:
    """How rows of a matrix become bytes: blocks of adjacent columns, one after the other."""

    #: Name of the type in GGUF.
    name: str
    #: Weights in a block; a row is a whole number of blocks.
    weights: int
    #: Bytes of a block, its scale included where it has one.
    block_bytes: int
    #: Bytes behind the last block of a tensor.
    tail: int = 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row. Raises ThriftyError where it is no whole number of blocks."""
        if cols < 1 or cols % self.weights:
            raise ThriftyError(
                f"[gguf] rows in {self.name} must be a multiple of {self.weights} columns; got {cols};"
                " choose another type, or BF16"
            )
        return cols // self.weights * self.block_bytes

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix [rows, cols]."""
        return rows * self.row_bytes(cols) + self.tail


#: A signed byte a weight and a float16 scale in front of 32 of them.
Q8_0 = BlockFormat("Q8_0", 32, 34)
#: Five base-3 digits a byte and a float16 scale behind 256 of them (1.69 bits a weight).
TQ1_0 = BlockFormat("TQ1_0", 256, 54)
#: Two bits a weight and a float16 scale behind 256 of them.
TQ2_0 = BlockFormat("TQ2_0", 256, 66)
#: Two bits a weight, and one float32 scale behind the whole tensor, in 32 bytes (bitnet.cpp).
I2_S = BlockFormat("I2_S", 128, 32, 32)

GGUF_BLOCKS = {f.name: f for f in (Q8_0, TQ1_0, TQ2_0, I2_S)}
#: Those that hold codes -1, 0 and 1.
GGUF_TERNARY = ("TQ1_0", "TQ2_0", "I2_S")

#: Bits that the four digits of a byte are shifted by, in the order of the weights.
_SHIFTS = {"TQ2_0": (0, 2, 4, 6), "I2_S": (6, 4, 2, 0)}
#: Where bytes of TQ1_0 lie in a block, and where the weights of their digits: (bytes, width, weights, digits).
_TQ1_PARTS = (
    (slice(0, 32), 32, slice(0, 160), 5),
    (slice(32, 48), 16, slice(160, 240), 5),
    (slice(48, 52), 4, slice(240, 256), 4),
)
#: The byte of TQ1_0 that stands for a number of five base-3 digits: its first digit is floor(3 byte / 256).
_TQ1_BYTES = ((np.arange(3**5) * 256 + 3**5 - 1) // 3**5).astype(np.uint8)


def gguf_encode(kind: str, codes: np.ndarray, scale: float) -> np.ndarray:
    """Bytes of weights codes * scale, as ggml's quantizers make them of those floats.

    kind: 'TQ1_0', 'TQ2_0' or 'I2_S'; codes: int8 [rows, cols], each -1, 0 or 1; scale: the float32 that multiplies.
    Returns uint8 [rows * row bytes + tail]. Digits are codes + 1, weight e of a group of 128 (TQ2_0, I2_S) in byte
    e mod 32. I2_S stores the scale once; the others store float16(scale) in every block, 0 where a block is all zero.
    Raises ThriftyError where a code is none of the three, the columns are no whole blocks, or the scale is not
    positive and finite in the type that stores it.
    Source: ggml-quants.c (quantize_row_tq1_0_ref, quantize_row_tq2_0_ref), bitnet.cpp (quantize_i2_s).
    """
    fmt, codes = _ternary("gguf_encode", kind), np.asarray(codes)
    rows, cols = codes.shape
    size = fmt.nbytes(rows, cols)
    if not np.isin(codes, (-1, 0, 1)).all():
        wrong = codes[~np.isin(codes, (-1, 0, 1))][0]
        raise ThriftyError(f"[gguf_encode] codes of {kind} must be among (-1, 0, 1); got {wrong}")
    stored = _stored_scale(kind, scale)
    digits = (codes + np.int8(1)).astype(np.uint8).reshape(-1, fmt.weights)
    out = np.zeros(size, np.uint8)
    blocks = out[: size - fmt.tail].reshape(-1, fmt.block_bytes)
    if kind == "TQ1_0":
        for bytes_at, width, weights_at, n in _TQ1_PARTS:
            worth = 3 ** np.arange(4, 4 - n, -1)
            number = np.tensordot(digits[:, weights_at].reshape(-1, n, width), worth, axes=(1, 0))
            blocks[:, bytes_at] = _TQ1_BYTES[number]
    else:
        shifts = np.asarray(_SHIFTS[kind], np.uint8)[:, None]
        bytes_ = np.bitwise_or.reduce(digits.reshape(-1, 4, 32) << shifts, axis=1)
        blocks[:, : fmt.weights // 4] = bytes_.reshape(len(digits), -1)
    if kind == "I2_S":
        out[size - fmt.tail :][:4] = np.asarray([stored], "<f4").view(np.uint8)
    else:
        scales = np.where((digits != 1).any(1), stored, 0).astype("<f2")
        blocks[:, -2:] = scales[:, None].view(np.uint8)
    return out


def gguf_decode(kind: str, data: np.ndarray, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [rows, cols] and the scales float32 that multiply them: distinct, none 0, ascending.

    A block whose scale is 0 has codes 0, and of TQ1_0 and TQ2_0 the scale of a block of zeros does not count, so that
    what one scale was made of has one scale. data: uint8 [rows * row bytes + tail].
    Raises ThriftyError where the byte count does not fit, a digit stands for no code, or a scale is negative or not
    finite.
    """
    fmt, data = _ternary("gguf_decode", kind), np.asarray(data, np.uint8).reshape(-1)
    size = fmt.nbytes(rows, cols)
    if data.size != size:
        raise ThriftyError(f"[gguf_decode] {rows} x {cols} weights in {kind} take {size} bytes; got {data.size}")
    blocks = data[: size - fmt.tail].reshape(-1, fmt.block_bytes)
    digits = np.empty((len(blocks), fmt.weights), np.uint8)
    if kind == "TQ1_0":
        if not np.isin(blocks[:, :52], _TQ1_BYTES).all():
            raise ThriftyError("[gguf_decode] a byte of TQ1_0 stands for no five codes; download or convert it again")
        for bytes_at, width, weights_at, n in _TQ1_PARTS:
            worth = (3 ** np.arange(n)).astype(np.uint8)[:, None]
            rest = blocks[:, bytes_at].reshape(-1, 1, width) * worth
            digits[:, weights_at] = (rest.astype(np.uint16) * 3 >> 8).reshape(len(blocks), -1)
    else:
        shifts = np.asarray(_SHIFTS[kind], np.uint8)[:, None]
        bytes_ = blocks[:, : fmt.weights // 4].reshape(-1, 1, 32)
        digits[:] = (bytes_ >> shifts & 3).reshape(len(blocks), -1)
        if (digits == 3).any():
            raise ThriftyError(f"[gguf_decode] digits of {kind} are 0, 1 and 2; got 3; download or convert it again")
    codes = digits.astype(np.int8) - np.int8(1)
    scales = gguf_block_scales(kind, data)
    codes[scales == 0] = 0
    counts = scales > 0 if kind == "I2_S" else codes.any(1)
    return codes.reshape(rows, cols), np.unique(scales[counts]).astype(np.float32)


def gguf_block_scales(kind: str, data: np.ndarray) -> np.ndarray:
    """The stored scale of every block, float32 [blocks]; data: uint8 [rows * row bytes + tail].

    Raises ThriftyError where one is negative or not finite.
    """
    fmt = _ternary("gguf_decode", kind)
    if kind == "I2_S":
        blocks = (data.size - fmt.tail) // fmt.block_bytes
        scales = np.repeat(data[data.size - fmt.tail :][:4].copy().view("<f4"), blocks)
    else:
        stored = data.reshape(-1, fmt.block_bytes)[:, -2:]
        scales = np.ascontiguousarray(stored).view("<f2")[:, 0].astype(np.float32)
    if not ((scales >= 0) & (scales < np.inf)).all():
        raise ThriftyError(f"[gguf_decode] scales of {kind} must be finite and not negative; download it again")
    return scales


def quantize_q8_0(values: np.ndarray) -> np.ndarray:
    """code = round(v * (1 / d)), d = max |v| / 127 over 32 columns; halves go away from zero; d is stored as float16.

    values: float32 [rows, cols], cols a multiple of 32. Returns uint8 [rows, row bytes]: d, then 32 signed bytes.
    Where 1 / d is not finite, the codes are 0.
    Raises ThriftyError where a value is not finite, or so large that float16 holds no d.
    Source: ggml-quants.c (quantize_row_q8_0_ref).
    """
    values = np.asarray(values, np.float32)
    rows, cols = values.shape
    blocks = np.empty(Q8_0.nbytes(rows, cols), np.uint8).reshape(-1, Q8_0.block_bytes)
    magnitudes = np.abs(values.reshape(-1, 32))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        d = magnitudes.max(1, keepdims=True) / np.float32(127)
        stored = d.astype("<f2")
        inverse = np.float32(1) / d
        scaled = magnitudes * np.where(np.isfinite(inverse), inverse, np.float32(0))
    if not np.isfinite(stored).all():
        raise ThriftyError(
            "[quantize_q8_0] values must be finite and below 8.3e6 in magnitude; got others; choose BF16 or F32"
        )
    whole = np.floor(scaled)
    codes = np.copysign(whole + (scaled - whole >= 0.5), values.reshape(-1, 32)).astype(np.int8)
    blocks[:, :2], blocks[:, 2:] = stored.view(np.uint8), codes.view(np.uint8)
    return blocks.reshape(rows, -1)


def dequantize_q8_0(data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """float32(code) * float32(d) of bytes made by `quantize_q8_0`: float32 [rows, cols].

    Raises ThriftyError where the byte count does not fit the shape.
    """
    data, size = np.asarray(data, np.uint8), Q8_0.nbytes(rows, cols)
    if data.size != size:
        raise ThriftyError(f"[dequantize_q8_0] {rows} x {cols} weights in Q8_0 take {size} bytes; got {data.size}")
    blocks = data.reshape(-1, Q8_0.block_bytes)
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return (blocks[:, 2:].view(np.int8) * d).reshape(rows, cols)


def _ternary(op: str, kind: str) -> BlockFormat:
    if kind not in GGUF_TERNARY:
        raise ThriftyError(f"[{op}] types of ternary codes are {', '.join(GGUF_TERNARY)}; got '{kind}'")
    return GGUF_BLOCKS[kind]


def _stored_scale(kind: str, scale: float) -> np.floating:
    """The scale as the file holds it."""
    holds = np.float32 if kind == "I2_S" else np.float16
    with np.errstate(over="ignore", under="ignore"):
        stored = holds(np.float32(scale))
    if not 0 < stored < np.inf:
        raise ThriftyError(
            f"[gguf_encode] the scale of {kind} must be positive and finite in {holds.__name__}; got {scale};"
            " pack the model again, or leave the matrix in BF16"
        )
    return stored
