"""A step of a decoder as a flat program of native ops: records of csrc/include/thrifty.h, and `thrifty_run`."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np

from thrifty.errors import ThriftyError
from thrifty.native._library import FORMAT_IDS, check_cols, load


class OpCode(IntEnum):
    """What an op does; csrc/include/thrifty.h says what its fields mean."""

    EMBED = 0
    QUANTIZE = 1
    RMS_NORM = 2
    MATMUL = 3
    FLOAT_MATMUL = 4
    ROPE_CACHE = 5
    ATTENTION = 6
    HEADS = 7
    KEY_SCORES = 8
    DYNAMIC_MASK = 9
    MLGRU = 10
    SSD = 11
    EXPERTS = 12


class OpFlag(IntFlag):
    """How an op takes its rows."""

    PRIVATE = 1
    GATHER = 2
    OUTPUTS = 4
    NORM = 8


NO_FLAGS = OpFlag(0)


class Epilogue(IntEnum):
    """What a product does with its values."""

    STORE = 0
    ADD = 1
    ACT = 2
    GATE_UP = 3
    MULTIPLY = 4


#: Numbers of the stored floats: dtype names as safetensors has them, and "I8" for caches.
DTYPE_IDS = {"F32": 0, "BF16": 1, "F16": 2, "I8": 3, "Q8_0": 4}
ACTIVATION_IDS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3, "relu2": 4, "sigmoid": 5}
#: What keys and values are in plain arrays.
CACHE_STORAGE = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
#: A cache's capacity is a multiple of this many positions.
CACHE_BLOCK = 64


class _Op(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("n", ctypes.c_int64 * 10),
        ("f", ctypes.c_float * 2),
        ("p", ctypes.c_void_p * 8),
    )


class _Slot(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("capacity", ctypes.c_int64), ("states", ctypes.c_void_p))


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("n_outputs", ctypes.c_int64),
        ("outputs", ctypes.c_void_p),
        ("n_caches", ctypes.c_int64),
        ("caches", ctypes.c_void_p),
    )


#: Address and capacity of a sequence's keys and values, and the address of its states where it has some.
Place = tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Op:
    """One op: numbers `n`, floats `f` and arrays `p` in the order of csrc/include/thrifty.h; None is a null pointer."""

    code: OpCode
    n: Sequence[int]
    p: Sequence[np.ndarray | None]
    f: Sequence[float] = ()
    flags: OpFlag = NO_FLAGS


class Program:
    """Ops over arrays that live as long as the program, run in one native call. Not for two threads at once.

    rows and outputs: most rows, and rows that go on after GATHER, of a batch. The caller fills `tokens`, `positions`,
    `slots` (int32 [rows]) and `output_rows` (int32 [outputs]) before `run`.
    """

    def __init__(self, ops: Sequence[Op], rows: int, outputs: int, n_threads: int) -> None:
        library = load()
        if library is None:
            raise ThriftyError("[step] a program needs the native library; install with a C++ compiler")
        self._library = library
        self.ops = list(ops)
        self.n_threads = n_threads
        self._records = (_Op * len(ops))()
        for record, op in zip(self._records, ops, strict=True):
            record.code, record.flags = op.code, op.flags
            record.n[: len(op.n)] = [int(n) for n in op.n]
            record.f[: len(op.f)] = [float(f) for f in op.f]
            record.p[: len(op.p)] = [None if p is None else p.ctypes.data for p in op.p]
        self.tokens, self.positions, self.slots = (np.zeros(rows, np.int32) for _ in range(3))
        self.output_rows = np.zeros(outputs, np.int32)
        self._caches = (_Slot * rows)()
        self._seconds = (ctypes.c_double * len(ops))()
        arrays = (self.tokens, self.positions, self.slots)
        tokens, positions, slots = (a.ctypes.data for a in arrays)
        self._batch = _Batch(
            0, tokens, positions, slots, 0, self.output_rows.ctypes.data, 0, ctypes.addressof(self._caches)
        )
        self._address = ctypes.addressof(self._records)

    def run(
        self,
        rows: int,
        outputs: int,
        caches: Sequence[Place],
        begin: int = 0,
        end: int | None = None,
        timed: bool = False,
    ) -> None:
        """Run the ops from `begin` to `end` on `rows` rows, of which `outputs` of `output_rows` go on after a GATHER.

        caches: address, capacity and, where an op keeps them, address of the states of each slot. timed: fill
        `seconds`. Raises ThriftyError where a token, position or slot is out of range.
        """
        batch, most = self._batch, len(self._caches)
        if rows > most or outputs > len(self.output_rows) or len(caches) > most:
            raise ThriftyError(
                f"[step] the program takes {most} rows and caches and {len(self.output_rows)} outputs; got {rows} rows,"
                f" {len(caches)} caches and {outputs} outputs"
            )
        batch.n, batch.n_outputs, batch.n_caches = rows, outputs, len(caches)
        for slot, (base, capacity, *states) in zip(self._caches, caches, strict=False):
            slot.base, slot.capacity, slot.states = base, capacity, states[0] if states else None
        first, count = self._address + begin * ctypes.sizeof(_Op), (len(self.ops) if end is None else end) - begin
        seconds = ctypes.addressof(self._seconds) + 8 * begin if timed else None
        status = self._library.run(first, count, ctypes.addressof(self._batch), self.n_threads, seconds)
        self._library.check("step", status)

    @property
    def seconds(self) -> np.ndarray:
        """Seconds of each op in the last timed run, on the first thread, waiting included."""
        return np.array(self._seconds)


def cache_nbytes(dtype: str, layers: int, kv_heads: int, head_dim: int, capacity: int) -> int:
    """Bytes of the keys and values of a sequence; dtype 'F32', 'F16' or 'I8', capacity a multiple of CACHE_BLOCK.

    Raises ThriftyError for heads of more than 1024 at 'I8': beyond, a score is not exact.
    """
    library = load()
    if library is None:
        raise ThriftyError("[step] a native cache needs the native library; install with a C++ compiler")
    nbytes = library.cache_size(DTYPE_IDS[dtype], layers, kv_heads, head_dim, capacity)
    if nbytes == 0 and layers > 0 and capacity > 0 and dtype == "I8":
        raise ThriftyError(
            f"[step] head_dim of an 8-bit cache must be 1024 at most; got {head_dim}; use a cache of 16 bits"
        )
    return nbytes


def cache_copy(
    dtype: str,
    place: Place,
    k: np.ndarray,
    v: np.ndarray,
    scales: tuple[np.ndarray, np.ndarray] | None,
    into: bool,
) -> None:
    """The first positions of a cache to plain arrays, or with `into` from them into the cache.

    place: address and capacity of the cache. k, v: [layers, kv_heads, positions, head_dim], float32, float16 or int8 as
    `dtype` says; scales: for 'I8' those of k and v, float32 [layers, kv_heads, positions]. All contiguous.
    """
    library = load()
    if library is None:
        raise ThriftyError("[step] a native cache needs the native library; install with a C++ compiler")
    arrays = (k, v, *(scales or ()))
    fits = k.shape == v.shape and all(s.shape == k.shape[:3] and s.dtype == np.float32 for s in scales or ())
    stored = k.dtype == v.dtype == CACHE_STORAGE[dtype] and (scales is not None) == (dtype == "I8")
    if not (fits and stored and all(a.flags.c_contiguous and a.flags.aligned for a in arrays)):
        raise ThriftyError(f"[step] arrays of a cache must be contiguous and fit; got {[a.shape for a in arrays]}")
    layers, kv_heads, count, head_dim = k.shape
    slot = _Slot(*place[:2])
    addresses = [None if a is None else a.ctypes.data for a in (k, v, *(scales or (None, None)))]
    status = library.cache_copy(
        *(DTYPE_IDS[dtype], layers, kv_heads, head_dim, ctypes.addressof(slot), count, *addresses, into)
    )
    library.check("step", status)


def repack(
    fmt: str, row_block: np.ndarray, rows: int, packed: np.ndarray, first_tile: int, tile_step: int, n_threads: int
) -> None:
    """Write the tiles of a 'row_block' matrix (uint8 [rows / 4, cols]) to tiles first_tile, first_tile + tile_step ...

    packed: uint8 [tiles, blocks, 64] in layout fmt ('i2' or 'base3'). Raises ThriftyError where a digit is no code.
    """
    library = load()
    if library is None:
        raise ThriftyError("[pack] repacking needs the native library; install with a C++ compiler")
    check_cols("pack", fmt, row_block.shape[1])
    row_block = np.ascontiguousarray(row_block)
    status = library.repack(
        *(FORMAT_IDS[fmt], row_block.ctypes.data, rows, row_block.shape[1], packed.ctypes.data),
        *(first_tile, tile_step, n_threads),
    )
    library.check("pack", status)
