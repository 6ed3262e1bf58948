"""GGUF files: metadata with their types, and tensors as views of the mapped file; and the way back.

Versions 2 and 3, little-endian. Every count and length is held against the bytes that are left before anything is
made of it. Source: ggml/docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.checkpoint.atomic import atomic_file
from thrifty.checkpoint.pipeline import made_in_order
from thrifty.errors import ThriftyError
from thrifty.spec import GGUF_BLOCKS

#: Numbers of the types of tensors that are read and written here.
KIND_IDS = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "I2_S": 36}
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_KINDS = {number: kind for kind, number in KIND_IDS.items()}
_OTHERS = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"},
    **{14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"},
    37: "I8_S of Microsoft's fork, or IQ4_NL_4_8, which upstream removed",
    38: "TL1 of Microsoft's fork, or IQ4_NL_8_8, which upstream removed",
    39: "TL2 of Microsoft's fork, or MXFP4 upstream",
    **{40: "NVFP4", 41: "Q1_0", 42: "Q2_0"},
}

#: Types of metadata values: numbers as numpy holds them, and three more.
_NUMBERS = {
    **{number: np.dtype(name) for number, name in enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4"])},
    **{number: np.dtype(name) for number, name in enumerate(["<u8", "<i8", "<f8"], 10)},
}
_NUMBER_IDS = {dtype.str: number for number, dtype in _NUMBERS.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_MOST_DEPTH = 4
_MOST_DIMS = 4
_MOST_NAME = 63
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True, eq=False)
class Block:
    """A tensor as stored: `data` is uint8 [bytes], read-only."""

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True, eq=False)
class GGUF:
    """What a file holds, in its order. Values of metadata are as `save_gguf` takes them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Block]


@dataclass(frozen=True, eq=False)
class TensorToWrite:
    """A tensor whose bytes are made when their turn comes.

    kind: one of `KIND_IDS`; shape: as numpy has it, columns last.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor. Raises ThriftyError where it does not fit its type."""
        return _nbytes(self.name, self.kind, self.shape)


def open_gguf(path: str | Path) -> GGUF:
    """Metadata and tensors of a .gguf file; tensors are read-only views of the mapped file, nothing is copied.

    Raises ThriftyError where the file is absent, truncated or malformed, or holds a type that is not in `KIND_IDS`.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ThriftyError(f"[gguf] the file must exist; {path} does not; check the path") from None
    except (OSError, ValueError) as error:
        raise ThriftyError(
            f"[gguf] the file must be readable and not empty; {path}: {error}; check the path"
        ) from error
    return parse_gguf(pages, path)


def parse_gguf(pages: bytes | mmap.mmap, path: Path) -> GGUF:
    """`open_gguf` of the bytes of a file; `path` is for errors."""
    reader = _Reader(pages, path)
    reader.check_version()
    n_tensors, n_values = reader.unpack("<QQ", 16)
    reader.hold(n_values, 13, "metadata")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = reader.string()
        if not key or key in metadata:
            raise reader.error(f"key '{key}' occurs twice" if key else "a key is empty")
        metadata[key] = reader.value(*reader.unpack("<I", 4))
    alignment = metadata.get(_ALIGNMENT, np.uint32(32))
    if not _is_alignment(alignment):
        raise reader.error(f"{_ALIGNMENT} must be a uint32 that is a power of two up to 65536")
    reader.hold(n_tensors, 24, "tensors")
    infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = reader.string()
        if name in infos:
            raise reader.error(f"tensor '{name}' occurs twice")
        infos[name] = reader.tensor_info(name, int(alignment))
    return GGUF(path, metadata, _views(reader, infos, int(alignment)))


def save_gguf(
    path: str | Path,
    metadata: dict[str, Any],
    tensors: Iterable[TensorToWrite],
    written: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a GGUF file (version 3) atomically, in the given order.

    metadata: bool, str and numpy scalars; numpy arrays of numbers or bools; list[str]; tuples of such arrays. Tensors
    begin at multiples of `general.alignment`, 32 where that is absent. They are made on two threads while the one
    before is written, so that few are in memory at a time. written: told the name of each tensor once it is written.
    Raises ThriftyError where a tensor does not fit its type, and where the disk is full or the place cannot be written.
    """
    alignment = metadata.get(_ALIGNMENT, np.uint32(32))
    if not _is_alignment(alignment):
        raise ThriftyError(
            f"[gguf] {_ALIGNMENT} must be a uint32 that is a power of two up to 65536; got {alignment!r}"
        )
    tensors = list(tensors)
    values = [_text(key) + _value(key, value) for key, value in metadata.items()]
    infos, offset = [], 0
    for tensor in tensors:
        infos.append(_info(tensor, offset))
        offset += _round_up(tensor.nbytes, int(alignment))
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ThriftyError(f"[gguf] tensors must have names of their own; some of {path} share one")
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values)) + b"".join(values) + b"".join(infos)
    with atomic_file(path) as file:
        file.write(header)
        file.write(bytes(-len(header) % int(alignment)))
        for tensor, data in zip(tensors, made_in_order(tensor.make for tensor in tensors), strict=True):
            size = tensor.nbytes
            if data.nbytes != size:
                raise ThriftyError(f"[gguf] tensor '{tensor.name}' must have {size} bytes; got {data.nbytes}")
            file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
            file.write(bytes(-size % int(alignment)))
            written(tensor.name)


class _Reader:
    """A position in the header of a file, and what is wrong with it."""

    def __init__(self, pages: bytes | mmap.mmap, path: Path):
        self.pages, self.path, self.at, self.end = pages, path, 0, len(pages)

    def error(self, reason: str, way_out: str = "download or convert it again") -> ThriftyError:
        return ThriftyError(f"[gguf] the file must be whole and well formed; {self.path}: {reason}; {way_out}")

    def hold(self, count: int, least_bytes: int, what: str) -> None:
        """Raises ThriftyError where `count` things of at least so many bytes are not there."""
        left = self.end - self.at
        if count * least_bytes > left:
            raise self.error(f"at byte {self.at} it announces {count} {what}, and {left} bytes are left")

    def unpack(self, layout: str, size: int) -> tuple[int, ...]:
        self.hold(size, 1, "bytes")
        self.at += size
        return struct.unpack_from(layout, self.pages, self.at - size)

    def check_version(self) -> None:
        if self.pages[:4] != b"GGUF":
            raise ThriftyError(
                f"[gguf] a GGUF file begins with 'GGUF'; {self.path} begins with {bytes(self.pages[:4])!r};"
                " check that the download is complete and no web page"
            )
        self.at = 4
        (version,) = self.unpack("<I", 4)
        if version in (2, 3):
            return
        what, way_out = f"version {version}", "convert the model again with a current converter"
        if version and version % 2**24 == 0:
            what, way_out = "a big-endian file", "convert it with gguf-convert-endian"
        raise ThriftyError(f"[gguf] versions 2 and 3, little-endian, are read here; {self.path} is {what}; {way_out}")

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        pages, at, end = self.pages, self.at, self.end
        texts = []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + int.from_bytes(pages[at:begin], "little")
                if at > end:
                    raise self.error("a string ends behind the file")
                texts.append(pages[begin:at].decode())
        except UnicodeDecodeError:
            raise self.error(f"the string at byte {begin} is not UTF-8") from None
        self.at = at
        return texts

    def value(self, kind: int) -> Any:
        """The value of a type, which begins here."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        value = self.numbers(kind, 1)[0]
        return bool(value) if kind == _BOOL else value

    def array(self, depth: int = 1) -> Any:
        kind, count = self.unpack("<IQ", 12)
        if kind == _STRING:
            self.hold(count, 8, "strings")
            return self.strings(count)
        if kind != _ARRAY:
            return self.numbers(kind, count)
        if depth == _MOST_DEPTH:
            raise self.error(f"arrays lie more than {_MOST_DEPTH} deep in one another")
        self.hold(count, 12, "arrays")
        return tuple(self.array(depth + 1) for _ in range(count))

    def numbers(self, kind: int, count: int) -> np.ndarray:
        """`count` numbers or bools of a type, which begin here: a copy."""
        if kind not in _NUMBERS and kind != _BOOL:
            raise self.error(f"metadata have types 0 to 12, and one has {kind}")
        dtype = _NUMBERS.get(kind, np.dtype("u1"))
        self.hold(count, dtype.itemsize, "numbers")
        values = np.frombuffer(self.pages, dtype, count, self.at).copy() if count else np.empty(0, dtype)
        self.at += values.nbytes
        if kind != _BOOL:
            return values
        if (values > 1).any():
            raise self.error("a bool is neither 0 nor 1")
        return values.view(bool)

    def tensor_info(self, name: str, alignment: int) -> tuple[int, tuple[int, ...], int]:
        """Number of the type, shape in numpy's order, and offset of a tensor."""
        (n_dims,) = self.unpack("<I", 4)
        if n_dims > _MOST_DIMS:
            raise self.error(f"tensor '{name}' has {n_dims} axes, and at most {_MOST_DIMS} are known")
        shape = self.unpack(f"<{n_dims}Q", 8 * n_dims)[::-1]
        if math.prod(shape) >= 2**63 or max(shape, default=0) >= 2**63:
            raise self.error(f"tensor '{name}' has an absurd shape {list(shape)}")
        number, offset = self.unpack("<IQ", 12)
        if offset % alignment:
            raise self.error(f"tensor '{name}' begins at byte {offset} of the data, no multiple of {alignment}")
        return number, shape, offset


def _views(reader: _Reader, infos: dict[str, tuple[int, tuple[int, ...], int]], alignment: int) -> dict[str, Block]:
    """The tensors, each ending before the next one begins."""
    data = _round_up(reader.at, alignment) if infos else reader.end
    left = max(reader.end - data, 0)
    order = sorted(infos, key=lambda name: infos[name][2])
    blocks: dict[str, Block] = {}
    next_offset = left
    for name in reversed(order):
        number, shape, offset = infos[name]
        kind = _kind(reader, name, number, shape, next_offset - offset, alignment)
        size = _nbytes(name, kind, shape, reader.path)
        if offset + size > next_offset:
            where = (
                f"the file ends {offset + size - left} bytes too early"
                if next_offset == left
                else "another begins within"
            )
            raise reader.error(f"tensor '{name}' has {size} bytes from byte {offset} of the data on, and {where}")
        view = np.frombuffer(reader.pages, np.uint8, size, data + offset) if size else np.empty(0, np.uint8)
        blocks[name] = Block(kind, shape, view)
        next_offset = offset
    return {name: blocks[name] for name in infos}


def _kind(reader: _Reader, name: str, number: int, shape: tuple[int, ...], room: int, alignment: int) -> str:
    if number == KIND_IDS["I2_S"]:
        # Upstream gave this number to another type once; only the bytes tell them apart.
        size = math.prod(shape) // 4 + GGUF_BLOCKS["I2_S"].tail
        if room <= _round_up(size, alignment):
            return "I2_S"
        raise ThriftyError(
            f"[gguf] type 36 is I2_S in Microsoft's fork and was IQ4_NL_4_4 upstream; tensor '{name}' of {reader.path}"
            f" has {room} bytes, and I2_S takes {size}; convert the model again"
        )
    if number not in _KINDS:
        what = f"{number} ({_OTHERS[number]})" if number in _OTHERS else f"{number}, which is unknown"
        raise ThriftyError(
            f"[gguf] types read here are {', '.join(KIND_IDS)}; tensor '{name}' of {reader.path} has type {what};"
            " take a file in one of them"
        )
    return _KINDS[number]


def _nbytes(name: str, kind: str, shape: tuple[int, ...], path: Path | None = None) -> int:
    """Bytes of a tensor."""
    if kind in FLOAT_BYTES:
        return math.prod(shape) * FLOAT_BYTES[kind]
    fmt = GGUF_BLOCKS[kind]
    cols = shape[-1] if shape else 1
    if cols % fmt.weights or not cols:
        where = f"tensor '{name}' of {path}" if path else f"tensor '{name}'"
        raise ThriftyError(
            f"[gguf] rows in {kind} must be a multiple of {fmt.weights} columns; {where} has shape {list(shape)};"
            " choose another type, or BF16"
        )
    return fmt.nbytes(math.prod(shape[:-1]), cols)


def _is_alignment(value: Any) -> bool:
    return type(value) is np.uint32 and int(value) in [2**power for power in range(17)]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """Type and bytes of a value of metadata."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.generic) and value.dtype.str in _NUMBER_IDS:
        return struct.pack("<I", _NUMBER_IDS[value.dtype.str]) + value.tobytes()
    return struct.pack("<I", _ARRAY) + _array(key, value)


def _array(key: str, value: Any) -> bytes:
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, tuple):
        return struct.pack("<IQ", _ARRAY, len(value)) + b"".join(_array(key, inner) for inner in value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        kind = _BOOL if value.dtype == bool else _NUMBER_IDS.get(little.dtype.str)
        if kind is not None:
            return struct.pack("<IQ", kind, len(value)) + little.tobytes()
    raise TypeError(f"[gguf] metadata are bool, str, numpy scalars and arrays, list[str]; '{key}' is {type(value)}")


def _info(tensor: TensorToWrite, offset: int) -> bytes:
    name = _text(tensor.name)
    if len(name) - 8 > _MOST_NAME or len(tensor.shape) > _MOST_DIMS or tensor.kind not in KIND_IDS:
        raise ThriftyError(
            f"[gguf] a tensor has a name of at most {_MOST_NAME} bytes, at most {_MOST_DIMS} axes and a type among"
            f" {', '.join(KIND_IDS)}; got '{tensor.name}', {list(tensor.shape)}, {tensor.kind}"
        )
    n = len(tensor.shape)
    return name + struct.pack(f"<I{n}QIQ", n, *tensor.shape[::-1], KIND_IDS[tensor.kind], offset)
