"""Typed wrappers of the native library (csrc/include/thrifty.h) over numpy arrays and over addresses.

Nothing is loaded before the first call. Without the library (no compiler at installation) the same calls run on numpy
through `thrifty.spec`: correct, and slow; `available()` and `info()` say so.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.errors import ThriftyError
from thrifty.native import _library
from thrifty.native._attention import attention, glu
from thrifty.native._experts import MOST_CHOSEN, product_key_experts, product_key_topk
from thrifty.native._gguf_blocks import dequantize_q8_0, gguf_decode, gguf_encode, quantize_q8_0
from thrifty.native._kept_until import kept_until
from thrifty.native._library import aligned_empty
from thrifty.native._matmul import ternary_matmul, ternary_matmul_into
from thrifty.native._mixers import dynamic_mask_attention, float_matmul, routed_experts, ssd
from thrifty.native._packed import KERNEL_FORMATS, PackedMatrix, pack, pack_into, unpack
from thrifty.native._quantize import quantize_into, quantize_per_token, rms_norm
from thrifty.native._step import (
    ACTIVATION_IDS,
    CACHE_BLOCK,
    CACHE_STORAGE,
    DTYPE_IDS,
    NO_FLAGS,
    Epilogue,
    Op,
    OpCode,
    OpFlag,
    Place,
    Program,
    cache_copy,
    cache_nbytes,
    repack,
)
from thrifty.native._threads import MOST_THREADS, cpu_threads, default_threads


def available() -> bool:
    """Whether the native library is there."""
    return _library.load() is not None


def isa() -> str:
    """Name of the instruction set in use; 'numpy' without the library."""
    library = _library.load()
    return "numpy" if library is None else library.isa_name(library.isa_selected()).decode()


def built_isas() -> tuple[str, ...]:
    """Instruction sets in this build of the library, worst first."""
    library = _library.load()
    return _library.isa_names(library, library and library.isa_built())


def detected_isas() -> tuple[str, ...]:
    """Instruction sets of this processor and system that the library knows, worst first."""
    library = _library.load()
    return _library.isa_names(library, library and library.isa_detected())


def refused_isas() -> tuple[str, ...]:
    """Instruction sets in this build that the processor has and the system does not grant: 'amx', or none."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ()
    has = "amx" in built_isas() and {"amx_tile", "amx_int8"} <= set(flags)
    return ("amx",) if has and "amx" not in detected_isas() else ()


def select_isa(name: str | None) -> None:
    """Uses the named instruction set in this process from now on, or the best for None.

    Raises ThriftyError where it is unknown, not built or not detected; nothing falls back quietly.
    """
    _library.select(_library.load(), name)


def use_huge_pages(address: int, nbytes: int) -> None:
    """Asks for huge pages in memory that nobody has written to yet, where the system has them."""
    library = _library.load()
    if library is not None:
        library.use_huge_pages(address, nbytes)


def use_openmp(address: int | None) -> None:
    """Runs the library's jobs on the threads of the OpenMP runtime whose GOMP_parallel lies at an address, from now on;
    on threads of its own for None."""
    library = _library.load()
    if library is not None:
        library.use_openmp(address)


def read_bandwidth(buffer: np.ndarray, loop: int, n_threads: int) -> float:
    """Bytes per second of one pass of reading a contiguous buffer, cut between threads as a matrix is.

    loop: 0 linear; 1 linear and prefetched; 2 four streams a thread.
    """
    library = _library.load()
    if library is None:
        raise ThriftyError("[read_bandwidth] there is no native library; install with a C++ compiler")
    result = ctypes.c_double()
    status = library.read_bandwidth(buffer.ctypes.data, buffer.nbytes, loop, n_threads, ctypes.byref(result))
    library.check("read_bandwidth", status)
    return result.value


def int8_peak(n_threads: int, seconds: float = 0.05) -> float:
    """Operations per second, two for each product, of the best int8 product of the instruction set in use, on operands
    in registers: what no product of matrices exceeds."""
    library = _library.load()
    if library is None:
        raise ThriftyError("[int8_peak] there is no native library; install with a C++ compiler")
    result = ctypes.c_double()
    library.check("int8_peak", library.int8_peak(n_threads, seconds, ctypes.byref(result)))
    return result.value


def cache_evict(buffer: np.ndarray) -> None:
    """Drop a contiguous buffer from the processor's caches, so that its next reading comes from memory."""
    library = _library.load()
    if library is not None:
        library.cache_evict(buffer.ctypes.data, buffer.nbytes)


def info() -> dict[str, Any]:
    """What `thrifty info` prints: library, instruction sets and threads. Raises as the first call would."""
    library, reason = _library.find()
    return {
        "library": None if library is None else str(library.path),
        "reason": reason,
        "isa": isa(),
        "built": built_isas(),
        "detected": detected_isas(),
        "refused": refused_isas(),
        "threads": default_threads(),
        "cpu_threads": cpu_threads(),
    }


__all__ = [
    "ACTIVATION_IDS",
    "CACHE_BLOCK",
    "CACHE_STORAGE",
    "DTYPE_IDS",
    "KERNEL_FORMATS",
    "MOST_CHOSEN",
    "MOST_THREADS",
    "NO_FLAGS",
    "Epilogue",
    "Op",
    "OpCode",
    "OpFlag",
    "PackedMatrix",
    "Place",
    "Program",
    "aligned_empty",
    "attention",
    "available",
    "built_isas",
    "cache_copy",
    "cache_evict",
    "cache_nbytes",
    "cpu_threads",
    "default_threads",
    "dequantize_q8_0",
    "detected_isas",
    "dynamic_mask_attention",
    "float_matmul",
    "gguf_decode",
    "gguf_encode",
    "glu",
    "info",
    "int8_peak",
    "isa",
    "kept_until",
    "pack",
    "pack_into",
    "product_key_experts",
    "product_key_topk",
    "quantize_into",
    "quantize_per_token",
    "quantize_q8_0",
    "read_bandwidth",
    "refused_isas",
    "repack",
    "rms_norm",
    "routed_experts",
    "select_isa",
    "ssd",
    "ternary_matmul",
    "ternary_matmul_into",
    "unpack",
    "use_huge_pages",
    "use_openmp",
]
