"""Cases of the C interface with what the spec expects of them, in the file that tests/native/driver.cpp reads."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from thrifty import spec
from thrifty.native import ACTIVATION_IDS, DTYPE_IDS
from thrifty.native._gguf_blocks import KIND_IDS
from thrifty.native._library import FORMAT_IDS as TERNARY_IDS

FORMAT_IDS = {**TERNARY_IDS, "i8": 3, "i4": 4}
#: Statuses of csrc/include/thrifty.h.
BAD_ARGUMENT, BAD_FORMAT, BAD_CODE, UNKNOWN_ISA = 1, 2, 3, 4
#: In the order of `Function` in the driver.
FUNCTIONS = (
    *("pack_size", "cache_size", "cache_copy", "isa_select", "buffer", "cache_evict", "pack", "unpack", "repack"),
    *("ternary_matmul", "quantize_per_token", "rms_norm", "glu", "read_bandwidth", "int8_peak", "run"),
    *("product_key_topk", "product_key_experts", "kept_until"),
    *("gguf_encode", "gguf_decode", "quantize_q8_0", "dequantize_q8_0"),
)
#: In the order of `Check` in the driver.
GIVEN, EXACT, CLOSE, ANY, CACHE = range(5)
NULL = -1
UGLY = (1, 3, 63, 257, 500)
ROWS = (*range(1, 18), 31, 33)


def _counted(data: bytes, count: int) -> bytes:
    return np.int64(count).tobytes() + data


class Case:
    """Arrays and calls on them. Methods that add an array give its index, which stands for its address in a call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._arrays: list[bytes] = []
        self._calls: list[bytes] = []

    def _add(self, check: int, start: np.ndarray, expected: np.ndarray | None = None, tolerance: float = 0) -> int:
        first, second = start.tobytes(), b"" if expected is None else expected.tobytes()
        head = np.int64(check).tobytes() + np.float64(tolerance).tobytes()
        self._arrays.append(head + _counted(first, len(first)) + _counted(second, len(second)))
        return len(self._arrays) - 1

    def given(self, array: np.ndarray) -> int:
        return self._add(GIVEN, array)

    def exact(self, expected: np.ndarray, start: np.ndarray | None = None) -> int:
        return self._add(EXACT, poison(expected) if start is None else start, expected)

    def close(self, expected: np.ndarray, start: np.ndarray | None = None, dtype: str = "float32") -> int:
        expected = expected.astype(np.float32)
        tolerance = spec.TOLERANCES[dtype] * max(float(np.abs(expected).max()), 1)
        return self._add(CLOSE, poison(expected) if start is None else start, expected, tolerance)

    def same(self, start: np.ndarray) -> int:
        """Floats that only have to be the same on any thread count, and no NaN."""
        return self._add(CLOSE, start, np.zeros(start.nbytes, np.uint8), np.inf)

    def scratch(self, start: np.ndarray) -> int:
        return self._add(ANY, start)

    def cache(self, dtype: str, layers: int, kv_heads: int, head_dim: int, capacity: int) -> int:
        return self._add(CACHE, np.array([DTYPE_IDS[dtype], layers, kv_heads, head_dim, capacity], np.int64))

    def call(self, function: str, *numbers: int, floats: Sequence[float] = (), result: int = 0) -> None:
        head = np.array([FUNCTIONS.index(function), result], np.int64).tobytes()
        integers = _counted(np.array(numbers, np.int64).tobytes(), len(numbers))
        self._calls.append(head + integers + _counted(np.array(floats, np.float64).tobytes(), len(floats)))

    def __bytes__(self) -> bytes:
        arrays = _counted(b"".join(self._arrays), len(self._arrays))
        return _counted(self.name.encode(), len(self.name)) + arrays + _counted(b"".join(self._calls), len(self._calls))


def poison(like: np.ndarray) -> np.ndarray:
    """As many bytes, which are NaN in every float format."""
    return np.full(like.nbytes, 0xFF, np.uint8)


def write(path: Path, cases: Sequence[Case]) -> None:
    path.write_bytes(_counted(b"".join(map(bytes, cases)), len(cases)))


# ---- single ops


def pack_case(rng: np.random.Generator, fmt: str, rows: int, cols: int) -> Case:
    record, case = spec.FORMATS[fmt], Case(f"pack {fmt} {rows}x{cols}")
    codes = rng.choice(np.array(record.codes, np.int8), (rows, cols))
    packed = spec.pack(record, codes)
    given, there, back = case.given(codes), case.exact(packed), case.exact(codes)
    case.call("pack_size", FORMAT_IDS[fmt], rows, cols, result=packed.nbytes)
    case.call("pack", FORMAT_IDS[fmt], rows, cols, given, there)
    case.call("unpack", FORMAT_IDS[fmt], rows, cols, there, back)
    return case


def repack_case(rng: np.random.Generator, fmt: str, rows: int, cols: int) -> Case:
    case = Case(f"repack {fmt} {rows}x{cols}")
    codes = rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    tiles = spec.pack(spec.FORMATS[fmt], codes)
    packed = np.full((2 * len(tiles), *tiles.shape[1:]), 0xFF, np.uint8)  # the last tile is the last of the array
    packed[1::2] = tiles
    arrays = case.given(spec.pack(spec.ROW_BLOCK, codes)), case.exact(packed)
    case.call("repack", FORMAT_IDS[fmt], arrays[0], rows, cols, arrays[1], 1, 2)
    return case


def gguf_case(rng: np.random.Generator, kind: str, rows: int, blocks: int) -> Case:
    fmt, cols = spec.GGUF_BLOCKS[kind], blocks * spec.GGUF_BLOCKS[kind].weights
    case, codes = Case(f"gguf {kind} {rows}x{cols}"), rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    codes[0, : cols // blocks] = 0
    data = spec.gguf_encode(kind, codes, 0.75)
    scales = np.where(codes.reshape(-1, fmt.weights).any(1) if kind != "I2_S" else [True], np.float32(0.75), 0)
    given, there, back = case.given(codes), case.exact(data), case.exact(codes)
    case.call("gguf_encode", KIND_IDS[kind], given, rows, cols, there, floats=(0.75,))
    case.call("gguf_decode", KIND_IDS[kind], there, rows, cols, back, case.exact(scales.astype(np.float32)))
    return case


def q8_case(rng: np.random.Generator, dtype: str, rows: int, blocks: int) -> Case:
    case, cols = Case(f"q8_0 of {dtype} {rows}x{32 * blocks}"), 32 * blocks
    values = spec.round_bf16(rng.standard_normal((rows, cols)).astype(np.float32))
    values[0, :32] = 0
    stored = {"F32": values, "BF16": (values.view(np.uint32) >> 16).astype(np.uint16), "F16": values.astype(np.float16)}
    data = spec.quantize_q8_0(stored["F16"].astype(np.float32) if dtype == "F16" else values)
    there, back = case.exact(data), case.exact(spec.dequantize_q8_0(data, rows, cols))
    case.call("quantize_q8_0", case.given(stored[dtype]), DTYPE_IDS[dtype], rows, cols, there)
    case.call("dequantize_q8_0", there, rows, cols, back)
    return case


class Product:
    """Operands of a product, drawn; or with weights all `full` and x at its ends, where sums are largest."""

    def __init__(self, rng: np.random.Generator, fmt: str, rows: int, cols: int, n: int, full: int = 0) -> None:
        record = spec.FORMATS[fmt]
        self.w = rng.choice(np.array(record.codes, np.int8), (rows, cols))
        self.stride = record.padded(rows, cols)[1]
        self.x = np.zeros((n, self.stride), np.int8)
        self.x[:, :cols] = rng.integers(-128, 128, (n, cols))
        if full:
            self.w[:] = full
            self.x[:, :cols] = np.where(np.arange(n)[:, None] % 2, 127, -128)
        self.packed = spec.pack(record, self.w)
        self.w_scale = rng.uniform(0.01, 2, rows).astype(np.float32)
        self.bias = rng.standard_normal(rows).astype(np.float32)
        self.x_scales = rng.uniform(1e-3, 2, n).astype(np.float32)

    def expected(self, w_scale: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        return spec.ternary_matmul(self.x[:, : self.w.shape[1]], self.x_scales, self.w, w_scale, bias)


def matmul_case(rng: np.random.Generator, fmt: str, rows: int, cols: int, n: int, full: int = 0) -> Case:
    case, m = Case(f"ternary_matmul {fmt} {rows}x{cols}, {n} rows"), Product(rng, fmt, rows, cols, n, full)
    w_scale, bias = m.w_scale[: rows if n % 2 else 1], m.bias if n % 3 else None
    case.call(
        *("ternary_matmul", FORMAT_IDS[fmt], case.given(m.packed), rows, cols, case.given(w_scale), len(w_scale)),
        *(NULL if bias is None else case.given(bias), case.given(m.x), m.stride, case.given(m.x_scales), n),
        case.exact(m.expected(w_scale, bias)),
    )
    return case


def norm_case(rng: np.random.Generator, n: int, d: int) -> Case:
    case = Case(f"quantize_per_token and rms_norm {n}x{d}")
    x, gain = rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal(d).astype(np.float32)
    x[0] = 0
    given, gains = case.given(x), case.given(gain)
    for norm, g, at in ((0, None, NULL), (1, None, NULL), (1, gain, gains)):
        codes, scales = spec.quantize_per_token(x, g, norm=bool(norm))
        padded = np.pad(codes, ((0, 0), (0, 7)))
        arrays = case.exact(padded), case.exact(scales)
        case.call("quantize_per_token", given, at, norm, n, d, arrays[0], d + 7, arrays[1], floats=(1e-5,))
    case.call("rms_norm", given, gains, n, d, case.exact(spec.rms_norm(x, gain)), floats=(1e-5,))
    place = case.exact(spec.rms_norm(x), x)
    case.call("rms_norm", place, NULL, n, d, place, floats=(1e-5,))
    return case


def not_finite_case(d: int) -> Case:
    case, x = Case(f"quantize_per_token of what is not finite, {d}"), np.ones((3, d), np.float32)
    x[:, d // 2] = np.nan, np.inf, -np.inf
    given, scales = case.given(x), case.scratch(np.zeros(3, np.float32))
    for norm in (0, 1):
        codes = case.exact(np.zeros((3, d), np.int8))
        case.call("quantize_per_token", given, NULL, norm, 3, d, codes, d, scales, floats=(1e-5,))
    return case


def glu_case(rng: np.random.Generator, count: int, act: str) -> Case:
    case, (gate, up) = Case(f"glu {act} {count}"), (rng.standard_normal((2, count)) * 4).astype(np.float32)
    given, place = case.given(gate), case.close(spec.glu(gate, up, act), up)
    case.call("glu", given, place, ACTIVATION_IDS[act], count, place)
    case.call("glu", given, NULL, ACTIVATION_IDS[act], count, case.close(spec.ACTIVATIONS[act](gate)))
    return case


def kept_until_case(rng: np.random.Generator, keys: int, window: int) -> Case:
    case, scores = Case(f"kept_until {window} of {keys}"), rng.integers(0, 9, (3, keys)).astype(np.float32)
    ends, scratch = (
        np.stack([spec.kept_until(row, window) for row in scores]),
        np.zeros((3, min(window, keys)), np.uint64),
    )
    numbers = (case.given(scores), 3, keys, window, case.scratch(scratch), case.exact(ends))
    case.call("kept_until", *numbers)
    for at, value in ((0, NULL), (3, 0), (4, NULL), (5, NULL)):
        case.call("kept_until", *(value if i == at else n for i, n in enumerate(numbers)), result=BAD_ARGUMENT)
    return case


def topk_case(rng: np.random.Generator, n: int, k: int) -> Case:
    case, sides = Case(f"product_key_topk {k} of {n}"), rng.standard_normal((2, 3, n + 1)).astype(np.float32)
    sides[:, 1] = 0
    sums, numbers = spec.product_key_topk(sides[0, :, :n], sides[1, :, :n], k)
    # The last row ends with its last score.
    x, y = (case.given(side.ravel()[:-1]) for side in sides)
    case.call("product_key_topk", x, n + 1, y, n + 1, 3, n, k, case.exact(sums), case.exact(numbers))
    return case


def experts_case(rng: np.random.Generator, n: int, k: int, d: int, act: str) -> Case:
    case, experts = Case(f"product_key_experts {act} {n}x{k}x{d}"), 50
    x, down, up = (rng.standard_normal((rows, d)).astype(np.float32) for rows in (n, experts, experts))
    indices, weights = rng.integers(0, experts, (n, k)), rng.standard_normal((n, k)).astype(np.float32)
    indices[-1, -1] = experts - 1
    hidden = np.einsum("td,tkd->tk", x, down[indices])
    y = spec.product_key_experts(x, indices, weights, down, up, spec.ACTIVATIONS[act])
    x_at, at, w_at, down_at, up_at = (case.given(a) for a in (x, indices, weights, down, up))
    sizes, there = (n, k, d, experts), case.close(hidden)
    tables = (DTYPE_IDS["F32"], ACTIVATION_IDS[act])
    case.call("product_key_experts", x_at, at, w_at, down_at, up_at, *tables, *sizes, there, case.close(y))
    case.call("product_key_experts", x_at, at, NULL, down_at, NULL, *tables, *sizes, case.close(hidden), NULL)
    mixed = case.close(np.einsum("tk,tkd->td", weights, up[indices]))
    case.call("product_key_experts", NULL, at, w_at, NULL, up_at, *tables, *sizes, NULL, mixed)
    return case


def memory_cases() -> Iterator[Case]:
    for nbytes in (64, 65, 64 * 5 + 13, 100_000):
        case, buffer = Case(f"read_bandwidth of {nbytes} bytes"), np.ones(nbytes, np.uint8)
        given = case.given(buffer)
        for loop in range(3):
            case.call("read_bandwidth", given, nbytes, loop, 1)
        case.call("cache_evict", given, nbytes)
        yield case
    case = Case("buffer and int8_peak")
    case.call("int8_peak", 1, floats=(1e-4,))
    for nbytes in (1, 1000, 3 << 20):
        case.call("buffer", nbytes)
    yield case


def cache_copy_case(rng: np.random.Generator, dtype: str, kv_heads: int, d: int, count: int) -> Case:
    """What goes into a cache comes out of it."""
    case, layers, capacity = Case(f"cache_copy {dtype} {kv_heads}x{d}, {count} positions"), 2, 128
    shape, cache = (layers, kv_heads, count), case.cache(dtype, layers, kv_heads, d, capacity)
    width = {"F32": 4, "F16": 2, "I8": 1}[dtype]
    stored = [rng.integers(0, 256, (*shape, d * width)).astype(np.uint8) for _ in range(2)]
    stored += [rng.uniform(0, 1, shape).astype(np.float32) for _ in range(2 if dtype == "I8" else 0)]
    for into, add in ((1, case.given), (0, case.exact)):
        arrays = [add(a) for a in stored]
        numbers = DTYPE_IDS[dtype], layers, kv_heads, d, cache, capacity, count
        case.call("cache_copy", *numbers, *arrays, *[NULL] * (4 - len(arrays)), into)
    return case


def single_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Every function but `thrifty_run`."""
    shapes = [(rows, cols) for rows in UGLY for cols in UGLY]
    for i, (rows, cols) in enumerate(shapes):
        yield from (pack_case(rng, fmt, rows, cols) for fmt in FORMAT_IDS)
        yield from (repack_case(rng, fmt, rows, cols) for fmt in ("i2", "base3"))
        few = (1, 2 + i % 16, 33)
        yield from (matmul_case(rng, fmt, rows, cols, n) for fmt in ("i2", "base3") for n in few)
        yield from (matmul_case(rng, fmt, rows, cols, n) for fmt in ("i8", "i4") for n in (1, 2 + i % 16))
    yield from (matmul_case(rng, fmt, 63, 257, n) for fmt in ("i2", "base3") for n in ROWS)
    yield matmul_case(rng, "base3", 17, 1283, 70)
    for fmt in ("i2", "base3", "i8", "i4"):
        most = max(spec.FORMATS[fmt].codes)
        yield from (matmul_case(rng, fmt, 17, 3000, n, full) for full in (-most, most) for n in (2, 17))
    shapes = (1, 1), (3, 2), (63, 5)
    yield from (gguf_case(rng, kind, *shape) for kind in KIND_IDS for shape in shapes)
    yield from (q8_case(rng, dtype, *shape) for dtype in ("F32", "BF16", "F16") for shape in (*shapes, (63, 17)))
    yield from (norm_case(rng, n, d) for n in (1, 3) for d in (*UGLY, 15, 16, 17, 2560))
    yield norm_case(rng, 70, 1000)
    yield from (not_finite_case(d) for d in (1, 21, 500))
    yield from (glu_case(rng, count, act) for count in (*UGLY, 16) for act in spec.ACTIVATIONS)
    yield glu_case(rng, 20_001, "silu")
    shapes = (1, 2, 0), (1, 2, 1), (2, 18, 17), (3, 64, 128)
    yield from (cache_copy_case(rng, dtype, *shape) for dtype in ("F32", "F16", "I8") for shape in shapes)
    yield from (kept_until_case(rng, keys, window) for keys in UGLY for window in (1, 5, 600))
    yield from (topk_case(rng, n, k) for n in UGLY for k in (1, 7, 64, 512) if k <= n * n)
    shapes = (1, 1), (3, 7), (70, 64)
    yield from (experts_case(rng, *shape, d, act) for shape in shapes for d in UGLY for act in ("silu", "relu"))
    yield from memory_cases()


def gguf_refused_case() -> Case:
    case, a = Case("refused: blocks of GGUF"), np.zeros(256, np.float32)
    codes, data, floats = case.given(a.astype(np.int8)), case.given(a.view(np.uint8)), case.given(a)
    wrong, digits = case.given(np.full(256, 2, np.int8)), case.given(np.full(96, 0xFF, np.uint8))
    there, back = case.scratch(np.zeros(96, np.uint8)), case.scratch(np.zeros(256, np.float32))
    for kind in (-1, 3):
        case.call("gguf_encode", kind, codes, 1, 256, data, floats=(1.0,), result=BAD_FORMAT)
        case.call("gguf_decode", kind, data, 1, 256, codes, floats, result=BAD_FORMAT)
    for kind in KIND_IDS.values():
        for numbers in ((NULL, 1, 256, data), (codes, 1, 256, NULL), (codes, 0, 256, data), (codes, 1, 64, data)):
            case.call("gguf_encode", kind, *numbers, floats=(1.0,), result=BAD_ARGUMENT)
        for scale in (0.0, -1.0, np.inf, np.nan):
            case.call("gguf_encode", kind, codes, 1, 256, data, floats=(scale,), result=BAD_ARGUMENT)
        for numbers in ((NULL, 1, 256, codes, floats), (data, 1, 256, NULL, floats), (data, 1, 256, codes, NULL)):
            case.call("gguf_decode", kind, *numbers, result=BAD_ARGUMENT)
        case.call("gguf_encode", kind, wrong, 1, 256, there, floats=(1.0,), result=BAD_CODE)
        case.call("gguf_decode", kind, digits, 1, 256, back, there, result=BAD_CODE)
    for scale in (7e4, 1e-8):
        case.call("gguf_encode", KIND_IDS["TQ1_0"], codes, 1, 256, data, floats=(scale,), result=BAD_ARGUMENT)
    for numbers in (
        (NULL, 0, 1, 32, data),
        (floats, 0, 1, 32, NULL),
        (floats, 0, 1, 33, data),
        (floats, 0, 0, 32, data),
    ):
        case.call("quantize_q8_0", *numbers, result=BAD_ARGUMENT)
    case.call("quantize_q8_0", floats, 3, 1, 32, data, result=BAD_FORMAT)
    for number in (np.inf, np.nan, 9e6):
        bad = case.given(np.full(32, number, np.float32))
        case.call("quantize_q8_0", bad, 0, 1, 32, there, result=BAD_CODE)
    for numbers in ((NULL, 1, 32, floats), (data, 1, 32, NULL), (data, 1, 31, floats), (data, -1, 32, floats)):
        case.call("dequantize_q8_0", *numbers, result=BAD_ARGUMENT)
    return case


def refused_cases() -> Iterator[Case]:
    """Bad arguments of every function but `thrifty_run`: the status, and nothing written."""
    case = Case("refused: formats")
    codes, packed = case.given(np.zeros((16, 20), np.int8)), case.given(np.zeros(320, np.uint8))
    floats = case.given(np.zeros(320, np.float32))
    for fmt in (-1, 5):
        case.call("pack_size", fmt, 16, 20, result=0)
        case.call("pack", fmt, 16, 20, codes, packed, result=BAD_FORMAT)
        case.call("unpack", fmt, 16, 20, packed, codes, result=BAD_FORMAT)
    for fmt in (-1, 2, 3, 5):
        case.call("repack", fmt, packed, 16, 20, packed, 0, 1, result=BAD_FORMAT)
    for fmt in (-1, 2, 5):
        operands = (packed, 16, 20, floats, 1, NULL, codes, 20, floats, 1, floats)
        case.call("ternary_matmul", fmt, *operands, result=BAD_FORMAT)
    yield case

    case = Case("refused: shapes")
    codes, packed = case.given(np.zeros((16, 20), np.int8)), case.given(np.zeros(320, np.uint8))
    for rows, cols in ((0, 1), (1, 0), (-1, 1), (1, -5), (1, (1 << 18) + 1), (1 << 62, 1)):
        case.call("pack_size", 0, rows, cols, result=0)
        case.call("pack", 0, rows, cols, codes, packed, result=BAD_ARGUMENT)
        case.call("unpack", 0, rows, cols, packed, codes, result=BAD_ARGUMENT)
        case.call("repack", 0, packed, rows, cols, packed, 0, 1, result=BAD_ARGUMENT)
    case.call("pack", 0, 1, 1, NULL, packed, result=BAD_ARGUMENT)
    case.call("unpack", 0, 1, 1, packed, NULL, result=BAD_ARGUMENT)
    case.call("repack", 0, packed, 16, 16, packed, -1, 1, result=BAD_ARGUMENT)
    case.call("repack", 0, packed, 16, 16, packed, 0, 0, result=BAD_ARGUMENT)
    for dtype, kv_heads, d, capacity in ((1, 1, 8, 64), (4, 1, 8, 64), (0, 0, 8, 64), (0, 1, 0, 64), (0, 1, 8, 63)):
        case.call("cache_size", dtype, 1, kv_heads, d, capacity, result=0)
    yield case

    case = Case("refused: codes")
    wrong, digits = case.given(np.full((16, 20), -2, np.int8)), case.given(np.full(80, 0xFF, np.uint8))
    there, back = case.scratch(np.zeros(128, np.uint8)), case.scratch(np.zeros((16, 20), np.int8))
    for fmt in ("i2", "base3", "row_block"):
        case.call("pack", FORMAT_IDS[fmt], 16, 20, wrong, there, result=BAD_CODE)
        case.call("unpack", FORMAT_IDS[fmt], 16, 16 if fmt == "i2" else 20, digits, back, result=BAD_CODE)
    case.call("repack", 0, digits, 16, 16, there, 0, 1, result=BAD_CODE)
    yield case

    yield gguf_refused_case()

    case = Case("refused: operands")
    a = case.given(np.zeros(64, np.float32))
    good = [0, a, 16, 16, a, 16, a, a, 16, a, 1, a]
    for at, value in ((1, NULL), (4, NULL), (7, NULL), (9, NULL), (11, NULL), (5, 2), (8, 15), (10, -1), (2, 0)):
        numbers = [value if i == at else number for i, number in enumerate(good)]
        case.call("ternary_matmul", *numbers, result=BAD_ARGUMENT)
    case.call("ternary_matmul", 3, a, 1, (1 << 16) + 1, a, 1, NULL, a, 1 << 17, a, 1, a, result=BAD_ARGUMENT)
    case.call("ternary_matmul", *[0 if i == 10 else number for i, number in enumerate(good)])
    for numbers in ((NULL, a, 1, 1, 8, a, 8, a), (a, a, 1, 1, 8, NULL, 8, a), (a, a, 1, 1, 8, a, 8, NULL)):
        case.call("quantize_per_token", *numbers, floats=(1e-5,), result=BAD_ARGUMENT)
    for n, d, stride in ((-1, 8, 8), (1, 0, 8), (1, 8, 7)):
        case.call("quantize_per_token", a, a, 1, n, d, a, stride, a, floats=(1e-5,), result=BAD_ARGUMENT)
    for numbers in ((NULL, a, 1, 8, a), (a, a, 1, 8, NULL), (a, a, -1, 8, a), (a, a, 1, 0, a)):
        case.call("rms_norm", *numbers, floats=(1e-5,), result=BAD_ARGUMENT)
    for numbers in ((NULL, a, 0, 8, a), (a, a, 0, 8, NULL), (a, a, -1, 8, a), (a, a, 6, 8, a), (a, a, 0, -1, a)):
        case.call("glu", *numbers, result=BAD_ARGUMENT)
    topk = [a, 4, a, 4, 1, 4, 2, a, a]
    for at, value in ((0, NULL), (2, NULL), (7, NULL), (8, NULL), (1, 3), (3, 3), (4, -1), (5, 0), (6, 0), (6, 17)):
        numbers = [value if i == at else number for i, number in enumerate(topk)]
        case.call("product_key_topk", *numbers, result=BAD_ARGUMENT)
    experts = [a, a, a, a, a, 0, 0, 1, 1, 4, 1, a, a]
    wrong = ((0, NULL), (1, NULL), (2, NULL), (6, 6), (7, -1), (8, 0), (9, 0), (10, 0), (11, NULL), (12, NULL))
    for at, value in wrong:
        numbers = [value if i == at else number for i, number in enumerate(experts)]
        case.call("product_key_experts", *numbers, result=BAD_ARGUMENT)
    case.call("product_key_experts", a, a, a, NULL, NULL, *experts[5:], result=BAD_ARGUMENT)
    case.call("product_key_experts", *experts[:5], 3, *experts[6:], result=BAD_FORMAT)
    ones = case.given(np.ones(1, np.int64))
    case.call("product_key_experts", a, ones, *experts[2:], result=BAD_ARGUMENT)
    for numbers in ((NULL, 64, 0, 1), (a, 63, 0, 1), (a, 64, -1, 1), (a, 64, 3, 1), (a, 64, 0, 0)):
        case.call("read_bandwidth", *numbers, result=BAD_ARGUMENT)
    for rate, seconds in ((0, 1e-4), (1, 0.0), (1, -1.0), (1, np.nan)):
        case.call("int8_peak", rate, floats=(seconds,), result=BAD_ARGUMENT)
    copy = [DTYPE_IDS["I8"], 1, 1, 1, a, 64, 8, a, a, a, a, 0]
    for at, value in ((0, 1), (0, 4), (1, 0), (2, 0), (3, 0), (4, NULL), (5, 63), (6, -1), (6, 65)):
        case.call("cache_copy", *[value if i == at else number for i, number in enumerate(copy)], result=BAD_ARGUMENT)
    for at in (7, 8, 9, 10):
        case.call("cache_copy", *[NULL if i == at else number for i, number in enumerate(copy)], result=BAD_ARGUMENT)
    case.call("isa_select", case.given(np.frombuffer(b"sse9\0", np.uint8)), result=UNKNOWN_ISA)
    yield case
