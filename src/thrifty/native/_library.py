"""Finds and loads the native library, and declares its functions to ctypes."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import thrifty.native
from thrifty.errors import ThriftyError

ABI_VERSION = 7
FILE_NAME = {"win32": "libthrifty.dll", "darwin": "libthrifty.dylib"}.get(sys.platform, "libthrifty.so")

#: Numbers of the formats in the C interface.
FORMAT_IDS = {"i2": 0, "base3": 1, "row_block": 2, "i8": 3, "i4": 4}

#: Most columns of a matrix in each format, for its sums to stay in int32 (csrc/formats.hpp).
MOST_COLS = {"i2": 2**18, "base3": 2**18, "row_block": 2**18, "i8": 2**16, "i4": 2**17}

_int, _i64, _size, _float, _pointer = (
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_size_t,
    ctypes.c_float,
    ctypes.c_void_p,
)
_mask, _text = ctypes.c_uint32, ctypes.c_char_p

#: Result and argument types, in the order of csrc/include/thrifty.h.
_PROTOTYPES = {
    "abi_version": (_int,),
    "status_text": (_text, _int),
    "isa_built": (_mask,),
    "isa_detected": (_mask,),
    "isa_name": (_text, _int),
    "isa_selected": (_int,),
    "isa_select": (_int, _text),
    "use_openmp": (None, _pointer),
    "buffer_alloc": (_pointer, _size),
    "buffer_free": (None, _pointer),
    "use_huge_pages": (None, _pointer, _size),
    "pack_size": (_size, _int, _i64, _i64),
    "pack": (_int, _int, _i64, _i64, _pointer, _pointer, _int),
    "unpack": (_int, _int, _i64, _i64, _pointer, _pointer, _int),
    "repack": (_int, _int, _pointer, _i64, _i64, _pointer, _i64, _i64, _int),
    "gguf_encode": (_int, _int, _pointer, _i64, _i64, _float, _pointer, _int),
    "gguf_decode": (_int, _int, _pointer, _i64, _i64, _pointer, _pointer, _int),
    "quantize_q8_0": (_int, _pointer, _int, _i64, _i64, _pointer, _int),
    "dequantize_q8_0": (_int, _pointer, _i64, _i64, _pointer, _int),
    "ternary_matmul": (
        *(_int, _int, _pointer, _i64, _i64, _pointer, _i64, _pointer),
        *(_pointer, _i64, _pointer, _i64, _pointer, _int),
    ),
    "quantize_per_token": (_int, _pointer, _pointer, _float, _int, _i64, _i64, _pointer, _i64, _pointer, _int),
    "rms_norm": (_int, _pointer, _pointer, _float, _i64, _i64, _pointer, _int),
    "glu": (_int, _pointer, _pointer, _int, _i64, _pointer, _int),
    "kept_until": (_int, _pointer, _i64, _i64, _i64, _pointer, _pointer, _int),
    "product_key_topk": (_int, _pointer, _i64, _pointer, _i64, _i64, _i64, _i64, _pointer, _pointer, _int),
    "product_key_experts": (
        *(_int, _pointer, _pointer, _pointer, _pointer, _pointer, _int, _int),
        *(_i64, _i64, _i64, _i64, _pointer, _pointer, _int),
    ),
    "read_bandwidth": (_int, _pointer, _size, _int, _int, ctypes.POINTER(ctypes.c_double)),
    "int8_peak": (_int, _int, ctypes.c_double, ctypes.POINTER(ctypes.c_double)),
    "cache_evict": (None, _pointer, _size),
    "cache_size": (_size, _int, _i64, _i64, _i64, _i64),
    "cache_copy": (_int, _int, _i64, _i64, _i64, _pointer, _i64, _pointer, _pointer, _pointer, _pointer, _int),
    "run": (_int, _pointer, _i64, _pointer, _int, _pointer),
}


class Library:
    """The loaded library: its functions as attributes, without their `thrifty_` prefix."""

    def __init__(self, path: Path):
        self.path = path
        dll = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _PROTOTYPES.items():
            function = getattr(dll, f"thrifty_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        if self.abi_version() != ABI_VERSION:
            raise OSError(f"it has interface {self.abi_version()}, and this package speaks {ABI_VERSION}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the native library has no function '{name}'")

    def check(self, op: str, status: int) -> None:
        """Raises ThriftyError for a status other than success."""
        if status != 0:
            raise ThriftyError(f"[{op}] {self.status_text(status).decode()}")


def check_cols(op: str, fmt: str, cols: int) -> None:
    """Raises ThriftyError for more columns than products of the format can sum; with and without the library."""
    most = MOST_COLS.get(fmt, cols)
    if cols > most:
        raise ThriftyError(
            f"[{op}] a matrix in '{fmt}' must have at most {most} columns, for its sums to fit int32; got {cols};"
            " split it by columns, or leave it unpacked"
        )


@cache
def find() -> tuple[Library | None, str]:
    """The library, or None and the reason why there is none."""
    forced = os.environ.get("THRIFTY_LIBRARY")
    if forced and not Path(forced).is_file():
        raise ThriftyError(f"[native] THRIFTY_LIBRARY must name a file; got '{forced}'; unset it or correct it")
    paths = [Path(forced)] if forced else [Path(folder) / FILE_NAME for folder in thrifty.native.__path__]
    reason = f"no {FILE_NAME} beside the package; it was installed without a C++ compiler"
    for path in filter(Path.is_file, paths):
        try:
            return Library(path), ""
        except (OSError, AttributeError) as error:
            reason = f"{path} does not load: {error}"
            if forced:
                raise ThriftyError(f"[native] THRIFTY_LIBRARY {reason}; unset it or rebuild") from error
    return None, reason


@cache
def load() -> Library | None:
    """The library with the instruction set of THRIFTY_ISA, or None where there is none."""
    library, _ = find()
    forced = os.environ.get("THRIFTY_ISA")
    if forced:
        select(library, forced)
    return library


def isa_names(library: Library | None, mask: int | None) -> tuple[str, ...]:
    """Names in a mask, worst first; of all known instruction sets for None."""
    if library is None:
        return ()
    names = []
    while (name := library.isa_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(name for i, name in enumerate(names) if mask is None or mask >> i & 1)


def select(library: Library | None, name: str | None) -> None:
    """Uses the named instruction set, or the best for None."""
    if library is None:
        if name is not None:
            raise ThriftyError(f"[native] there is no native library to run '{name}': {find()[1]}")
        return
    if library.isa_select(None if name is None else name.encode()) != 0:
        known = isa_names(library, None)
        built, detected = isa_names(library, library.isa_built()), isa_names(library, library.isa_detected())
        rule = "is not detected on this processor" if name in built else "is not built into this library"
        if name not in known:
            rule = f"must be one of {', '.join(known)}"
        raise ThriftyError(
            f"[native] instruction set {rule}; got '{name}'; built: {', '.join(built)}; detected: {', '.join(detected)}"
        )


def aligned_empty(nbytes: int) -> np.ndarray:
    """Uninitialised uint8 [nbytes], aligned to 64 bytes and on huge pages where large; plain numpy without the library.

    The memory lives as long as any view of it.
    """
    library = load()
    if library is None:
        return np.empty(nbytes, np.uint8)
    return np.asarray(_Buffer(library, nbytes))


class _Buffer:
    """Native memory, freed once: when the last array that looks at it goes."""

    def __init__(self, library: Library, nbytes: int):
        self._free = library.buffer_free
        self._address = library.buffer_alloc(max(nbytes, 1))
        if not self._address:
            raise MemoryError(f"[native] no memory for {nbytes} bytes")
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (self._address, False)}

    def __del__(self):
        address, self._address = getattr(self, "_address", None), None
        if address:
            self._free(address)
