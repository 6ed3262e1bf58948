"""The matrices of a decoder in the layouts that native ops read."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from thrifty import native, spec
from thrifty.checkpoint import Folder, Tensor
from thrifty.checkpoint.names import has_bias, linear_shapes
from thrifty.native import DTYPE_IDS, NO_FLAGS, Epilogue, Op, OpCode, OpFlag
from thrifty.spec.formats import TILE_ROWS

#: Bytes.
CACHE_LINE = 64
#: Rows of a head that are quantised at a time.
_HEAD_ROWS = 256
#: Bytes of a piece of an arena.
_ARENA_BYTES = 32 << 20

_IDS = {"i2": 0, "base3": 1, "i8": 3, "i4": 4}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of one or several linears with the same input, their rows padded to whole tiles of sixteen."""

    #: A native format, or the dtype of stored floats.
    layout: str
    #: uint8 [tiles, blocks, 64], or stored floats [tiles * 16, cols]; of Q8_0 uint8 [tiles * 16, row bytes].
    data: np.ndarray
    cols: int
    #: float32 [tiles * 16]; scale is None for floats.
    scale: np.ndarray | None
    bias: np.ndarray | None

    @property
    def rows(self) -> int:
        """Rows with padding."""
        return self.data.shape[0] * (1 if self.scale is None else TILE_ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.data.nbytes

    @property
    def width(self) -> int:
        """Columns of a row of x: of codes, whole cache lines, since a load that spans two takes twice as long."""
        if self.scale is None:
            return self.cols
        return -(-spec.FORMATS[self.layout].padded(1, self.cols)[1] // CACHE_LINE) * CACHE_LINE

    def product(
        self,
        x: np.ndarray,
        scales: np.ndarray | None,
        y: np.ndarray,
        y_cols: int,
        epilogue: Epilogue,
        activation: int = 0,
        flags: OpFlag = NO_FLAGS,
        factors: np.ndarray | None = None,
    ) -> Op:
        """The op y = x W^T: x int8 codes [rows, width] with their scales, or float32 [rows, cols] and None.

        factors: float32 [y_cols] by which y is multiplied before the epilogue ADD adds to it.
        """
        packed = self.scale is not None
        layout = _IDS[self.layout] if packed else DTYPE_IDS[self.layout]
        stride = self.width if packed else row_stride(x)
        return Op(
            OpCode.MATMUL if packed else OpCode.FLOAT_MATMUL,
            (layout, self.rows, self.cols, stride, row_stride(y), y_cols, epilogue, activation),
            (self.data, self.scale, self.bias, x, scales, y, factors),
            flags=flags,
        )


class Arena:
    """Memory of many matrices in few large pieces: only those lie on huge pages, and a stream over small pages loses a
    sixth of its speed to their translation."""

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)

    def empty(self, nbytes: int) -> np.ndarray:
        """Uninitialised uint8 [nbytes], aligned to 64 bytes; its piece lives as long as any array in it."""
        padded = -(-nbytes // 64) * 64
        if padded > len(self._left):
            self._left = native.aligned_empty(max(padded, _ARENA_BYTES))
        taken, self._left = self._left[:nbytes], self._left[padded:]
        return taken


def row_stride(x: np.ndarray) -> int:
    """Elements from a row to the next, of an array or of some columns of one."""
    return x.strides[0] // x.itemsize


def tiles_of(rows: int) -> int:
    """Tiles of sixteen rows."""
    return -(-rows // TILE_ROWS)


def read_matrix(
    folder: Folder,
    layer: int,
    linears: list[str],
    order: Literal["stacked", "interleaved"],
    weight_format: str,
    n_threads: int,
    arena: Arena,
) -> Matrix:
    """Linears of a layer as one matrix: their tiles one linear after another, or by turns."""
    config, prefix = folder.config, f"model.layers.{layer}."
    shapes = linear_shapes(config, layer)
    rows, cols = [shapes[linear][0] for linear in linears], shapes[linears[0]][1]
    tiles = [tiles_of(n) for n in rows]
    firsts = list(range(len(linears))) if order == "interleaved" else np.cumsum([0, *tiles[:-1]]).tolist()
    step = len(linears) if order == "interleaved" else 1
    places = [slice(first, first + step * (n - 1) + 1, step) for first, n in zip(firsts, tiles, strict=True)]
    bias = None
    if has_bias(config, linears[0]):
        bias = np.zeros((sum(tiles), TILE_ROWS), np.float32)
        for linear, place in zip(linears, places, strict=True):
            bias[place] = _padded(folder.bias(prefix + linear))
        bias = bias.reshape(-1)
    if config.linear == "dense":
        weights = [folder.tensors[f"{prefix}{linear}.weight"] for linear in linears]
        matrix = _float_matrix(weights, places, bias, arena)
        weights[-1].release()
        return matrix
    blocks = spec.FORMATS[weight_format].packed_shape(1, cols)[1]
    data = arena.empty(sum(tiles) * blocks * 64).reshape(sum(tiles), blocks, 64)
    scale = np.zeros((sum(tiles), TILE_ROWS), np.float32)
    for linear, n, place in zip(linears, rows, places, strict=True):
        stored = folder.packed(prefix + linear)
        if stored is None:
            codes, multiplier = folder.codes(prefix + linear, n)
            data[place] = native.pack(weight_format, codes)
        else:
            row_block, multiplier = stored
            native.repack(weight_format, row_block, n, data, place.start, step, n_threads)
        scale[place] = _padded(np.full(n, multiplier, np.float32))
        folder.tensors[f"{prefix}{linear}.weight"].release()
    return Matrix(weight_format, data, cols, scale.reshape(-1), bias)


def read_dense(folder: Folder, name: str, arena: Arena) -> Matrix:
    """A linear that is dense whatever the others are ("model.layers.0.self_attn.dt_proj"), as stored."""
    weight, bias = folder.tensors[f"{name}.weight"], None
    if f"{name}.bias" in folder.tensors:
        bias = _padded(folder.float32(f"{name}.bias")).reshape(-1)
    return _float_matrix([weight], [slice(0, tiles_of(weight.shape[0]))], bias, arena)


def float_matrix(values: np.ndarray, arena: Arena) -> Matrix:
    """float32 [rows, cols] as a matrix."""
    return _float_matrix([Tensor.of(np.ascontiguousarray(values))], [slice(0, tiles_of(len(values)))], None, arena)


def read_ternary_head(folder: Folder, weight_format: str, arena: Arena) -> Matrix:
    """An output head of ternary weights."""
    codes, multiplier = folder.codes("lm_head", folder.config.vocab_size)
    rows, cols = codes.shape
    tiles, blocks, _ = spec.FORMATS[weight_format].packed_shape(rows, cols)
    data = arena.empty(tiles * blocks * 64).reshape(tiles, blocks, 64)
    data[:] = native.pack(weight_format, codes)
    scale = _padded(np.full(rows, multiplier, np.float32)).reshape(-1)
    return Matrix(weight_format, data, cols, scale, None)


def read_head(tensor: Tensor, bits: int | None, n_threads: int, arena: Arena) -> Matrix:
    """An output head as stored, or at 8 or 4 bits with a scale per row: max |w| / 127, or max |w| / 7."""
    if bits is None:
        return _float_matrix([tensor], [slice(0, tiles_of(tensor.shape[0]))], None, arena)
    layout, most = {8: ("i8", 127), 4: ("i4", 7)}[bits]
    rows, cols = tensor.shape
    tiles, blocks, _ = spec.FORMATS[layout].packed_shape(rows, cols)
    data = arena.empty(tiles * blocks * 64).reshape(tiles, blocks, 64)
    scale = np.zeros(tiles * TILE_ROWS, np.float32)

    def quantize(start: int) -> None:
        stop = min(start + _HEAD_ROWS, rows)
        values = np.empty((stop - start, cols), np.float32)
        tensor.widen(start, stop, values)
        if bits == 8:
            codes, scale[start:stop] = native.quantize_per_token(values, norm=False, n_threads=1)
        else:
            largest = np.maximum(np.abs(values).max(-1), np.float32(spec.EPS))
            codes = np.rint(values * (np.float32(most) / largest)[:, None]).astype(np.int8)
            scale[start:stop] = largest / np.float32(most)
        native.pack_into(layout, codes, data[start // TILE_ROWS : tiles_of(stop)])

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(quantize, range(0, rows, _HEAD_ROWS)))
    return Matrix(layout, data, cols, scale, None)


def _float_matrix(tensors: list[Tensor], places: list[slice], bias: np.ndarray | None, arena: Arena) -> Matrix:
    dtype = tensors[0].dtype if len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in DTYPE_IDS else "F32"
    cols = tensors[0].shape[1]
    stored = tensors[0].data.dtype if dtype != "F32" else np.dtype(np.float32)
    width = tensors[0].data.shape[1] if dtype != "F32" else cols
    tiles = sum(tiles_of(t.shape[0]) for t in tensors)
    data = arena.empty(tiles * TILE_ROWS * width * stored.itemsize).view(stored)
    data = data.reshape(tiles, TILE_ROWS, width)
    for tensor, place in zip(tensors, places, strict=True):
        values = tensor.data if tensor.dtype == dtype else tensor.float32()
        whole = values.shape[0] // TILE_ROWS
        part = data[place]
        part[:whole] = values[: whole * TILE_ROWS].reshape(whole, TILE_ROWS, width)
        if whole < len(part):
            part[whole] = 0
            part[whole, : values.shape[0] - whole * TILE_ROWS] = values[whole * TILE_ROWS :]
    return Matrix(dtype, data.reshape(-1, width), cols, None, bias)


def _padded(values: np.ndarray) -> np.ndarray:
    """Values [n] as [tiles, 16], zeros at the end."""
    out = np.zeros(tiles_of(len(values)) * TILE_ROWS, np.float32)
    out[: len(values)] = values
    return out.reshape(-1, TILE_ROWS)
