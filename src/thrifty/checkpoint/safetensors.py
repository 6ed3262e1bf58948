"""Tensors of a .safetensors file as views of its pages, and the way back.

The `safetensors` package checks the header. Its numpy side knows no bfloat16 and copies every tensor into anonymous
memory, so the bytes are mapped here.
"""

import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from thrifty.checkpoint.atomic import atomic_file
from thrifty.checkpoint.pipeline import made_in_order
from thrifty.errors import ThriftyError
from thrifty.spec import Q8_0, dequantize_q8_0, quantize_q8_0, round_bf16

#: Storage of each dtype in numpy; BF16 is the upper half of a float32, kept as uint16.
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor as stored: `data` holds its bits, for BF16 as uint16, for Q8_0 (of GGUF) as uint8 [rows, row bytes]."""

    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        if self.dtype == Q8_0.name:
            return *self.data.shape[:-1], self.data.shape[-1] // Q8_0.block_bytes * Q8_0.weights
        return self.data.shape

    def float32(self) -> np.ndarray:
        """A float32 copy. All others but F64 widen exactly."""
        out = np.empty(self.shape, np.float32)
        _widen(self.dtype, self.data, out)
        return out

    def widen(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write rows start ... stop - 1 as float32 to `out`."""
        _widen(self.dtype, self.data[start:stop], out)

    @classmethod
    def of(cls, values: np.ndarray, dtype: str | None = None) -> "Tensor":
        """`values` stored as `dtype`; by default as their own. BF16 rounds to nearest, ties to even.

        Raises ThriftyError where a finite value is none in float16.
        """
        if dtype == Q8_0.name:
            return cls(Q8_0.name, quantize_q8_0(values))
        if dtype == "BF16":
            bits = round_bf16(values).view(np.uint32) >> 16
            return cls("BF16", bits.astype(np.uint16))
        by_numpy = {storage: name for name, storage in DTYPES.items() if name != "BF16"}
        name = dtype or by_numpy[np.dtype(values.dtype)]
        with np.errstate(over="ignore"):
            stored = np.asarray(values, DTYPES[name], order="C")
        if name == "F16" and (np.isinf(stored) & np.isfinite(values)).any():
            raise ThriftyError(
                f"[checkpoint] float16 ends at 65504; got {np.abs(values).max():g}; take bfloat16 or float32"
            )
        return cls(name, stored)

    def release(self) -> None:
        """Let go of the pages of the file it lies in; the next look at any of its tensors maps them again.

        All of them: a look at a small tensor brings in much of its neighbours.
        """
        base: Any = self.data
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, memoryview):
            base = base.obj
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, eq=False)
class Pending:
    """A tensor to be written that is made when its turn comes: `make` gives its bits, as `Tensor.data`."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "Pending":
        """A tensor that is there already."""
        return cls(tensor.dtype, tensor.shape, lambda: tensor.data)


def _widen(dtype: str, data: np.ndarray, out: np.ndarray) -> None:
    if dtype == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, data)
        np.left_shift(bits, 16, out=bits)
    elif dtype == Q8_0.name:
        cols = out.shape[-1]
        out[...] = dequantize_q8_0(data, out.size // cols, cols).reshape(out.shape)
    else:
        np.copyto(out, data, casting="unsafe")


def open_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, as read-only views of the mapped file: nothing is copied.

    Raises ThriftyError where the file is absent, truncated, malformed, or holds a dtype that numpy lacks.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ThriftyError(f"[safetensors] the file must exist; {path} does not; check the path") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise _malformed(path, str(error)) from error
    (size,) = struct.unpack_from("<Q", pages)
    header = json.loads(pages[8 : 8 + size], object_pairs_hook=lambda pairs: _unique(path, pairs))
    header.pop("__metadata__", None)
    return {name: _view(path, pages, 8 + size, name, entry) for name, entry in header.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in the header of a .safetensors file that `open_safetensors` takes."""
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def save_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor | Pending],
    metadata: dict[str, str] | None = None,
    written: Callable[[str], None] = lambda _: None,
) -> None:
    """Write `tensors` atomically, in the given order; the data begin at a multiple of 64 bytes.

    Pending ones are made by two threads, a few at a time. written: told the name of each tensor once it is written.
    """
    pending = {name: t if isinstance(t, Pending) else Pending.of(t) for name, t in tensors.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, tensor in pending.items():
        stop = offset + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, data in zip(pending, made_in_order(t.make for t in pending.values()), strict=True):
            if data.shape != pending[name].shape or data.dtype != DTYPES[pending[name].dtype]:
                raise TypeError(f"'{name}' is {data.dtype} {data.shape} and was announced as {pending[name]}")
            file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
            written(name)


def _view(path: Path, pages: mmap.mmap, data: int, name: str, entry: dict[str, Any]) -> Tensor:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ThriftyError(
            f"[safetensors] dtypes read here are {', '.join(DTYPES)}; tensor '{name}' of {path} is {dtype}; convert it"
        )
    storage = DTYPES[dtype]
    count = (stop - start) // storage.itemsize
    values = np.frombuffer(pages, storage, count, data + start) if count else np.empty(0, storage)
    return Tensor(dtype, values.reshape(shape))


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise _malformed(path, f"'{twice}' occurs twice in the header")
    return entries


def _malformed(path: Path, reason: str) -> ThriftyError:
    reason = reason.removeprefix("Error while deserializing header: ")
    return ThriftyError(
        f"[safetensors] the file must be whole and well formed; {path}: {reason}; download or save it again"
    )
