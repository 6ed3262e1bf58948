"""Programs of `thrifty_run` with what the spec expects of them, as cases for tests/native/driver.cpp."""

from collections.abc import Iterator, Sequence

import numpy as np
from native_cases import BAD_ARGUMENT, FORMAT_IDS, NULL, UGLY, Case, Product, poison

from thrifty import spec
from thrifty.checkpoint import Tensor
from thrifty.native import ACTIVATION_IDS, CACHE_BLOCK, DTYPE_IDS, Epilogue, OpCode, OpFlag

#: Rows that a buffer of a private row needs, one for each thread of the driver at most.
THREADS = 7
EPS = 1e-5
#: Floats as matrices and tables store them.
FLOATS = ("F32", "BF16", "F16", "Q8_0")


class Program:
    """Ops, and runs of them on the arrays of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._ops: list[int] = []
        self._floats: list[float] = []
        self._nowhere: tuple[int, int] | None = None

    def op(self, code: int, n: Sequence[int], p: Sequence[int], f: float = 0, flags: int = 0) -> None:
        self._ops += [code, flags, *n, *[0] * (10 - len(n)), *p, *[NULL] * (8 - len(p))]
        self._floats += [f, 0]

    def run(
        self,
        rows: int,
        tokens: Sequence[int] = (),
        positions: Sequence[int] = (),
        slots: Sequence[int] = (),
        outputs: Sequence[int] = (),
        caches: Sequence[tuple[int, ...]] = (),
        result: int = 0,
    ) -> None:
        def integers(values: Sequence[int]) -> int:
            return self.case.given(np.array(values if len(values) else [0] * rows, np.int32))

        if not caches and self._nowhere is None:
            self._nowhere = self.case.given(np.zeros(64, np.uint8)), CACHE_BLOCK
        places = caches or [self._nowhere or (NULL, 0)]
        count = len(self._ops) // 20
        batch = [rows, integers(tokens), integers(positions), integers(slots), len(outputs), integers(outputs)]
        places = [len(places), *(number for place in places for number in (*place, NULL)[:3])]
        seconds = self.case.scratch(np.zeros(count, np.float64))
        self.case.call("run", count, *self._ops, *batch, *places, seconds, floats=self._floats, result=result)


def tiled(values: np.ndarray) -> np.ndarray:
    """Rows padded to tiles of 16."""
    return np.pad(values, [(0, -len(values) % 16)] + [(0, 0)] * (values.ndim - 1))


def paired(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows of two matrices as GATE_UP wants them: a tile of one, a tile of the other."""
    tiles = [tiled(m).reshape(-1, 16, *m.shape[1:]) for m in (gate, up)]
    return np.stack(tiles, 1).reshape(-1, *gate.shape[1:])


# ---- one op


def matmul_case(rng: np.random.Generator, fmt: str, rows: int, cols: int, n: int) -> Case:
    case, m = Case(f"step: matmul {fmt} {rows}x{cols}, {n} rows"), Product(rng, fmt, rows, cols, n)
    expected = m.expected(m.w_scale, m.bias)
    operands = [case.given(a) for a in (m.packed, tiled(m.w_scale), tiled(m.bias), m.x, m.x_scales)]
    numbers = FORMAT_IDS[fmt], rows, cols, m.stride
    store = Program(case)
    store.op(OpCode.MATMUL, (*numbers, rows, rows, Epilogue.STORE), (*operands, case.exact(expected)))
    store.run(n)
    half = np.full((n, rows + 5), 0.5, np.float32)
    for epilogue, values in ((Epilogue.ADD, 0.5 + expected), (Epilogue.MULTIPLY, 0.5 * expected)):
        program, total = Program(case), half.copy()
        total[:, :rows] = values
        program.op(OpCode.MATMUL, (*numbers, rows + 5, rows, epilogue), (*operands, case.exact(total, half)))
        program.run(n)
    return case


def activation_case(rng: np.random.Generator, fmt: str, rows: int, n: int, act: str) -> Case:
    case, cols = Case(f"step: {act} of {fmt}, {rows} columns, {n} rows"), 90
    gate, up = (Product(rng, fmt, rows, cols, n) for _ in range(2))
    gate.x_scales /= 50  # keeps gates where activations bend
    up.x, up.x_scales = gate.x, gate.x_scales
    gates, ups = (m.expected(m.w_scale, m.bias) for m in (gate, up))
    x, x_scales = case.given(gate.x), case.given(gate.x_scales)
    pairs = (
        spec.pack(spec.FORMATS[fmt], paired(gate.w, up.w)),
        paired(gate.w_scale, up.w_scale),
        paired(gate.bias, up.bias),
    )
    both = Program(case)
    numbers = (FORMAT_IDS[fmt], len(pairs[1]), cols, gate.stride, rows, rows, Epilogue.GATE_UP, ACTIVATION_IDS[act])
    both.op(
        OpCode.MATMUL, numbers, (*(case.given(a) for a in pairs), x, x_scales, case.close(spec.glu(gates, ups, act)))
    )
    both.run(n)
    one = Program(case)
    numbers = (FORMAT_IDS[fmt], rows, cols, gate.stride, rows, rows, Epilogue.ACT, ACTIVATION_IDS[act])
    operands = [case.given(a) for a in (gate.packed, tiled(gate.w_scale), tiled(gate.bias))]
    one.op(OpCode.MATMUL, numbers, (*operands, x, x_scales, case.close(spec.ACTIVATIONS[act](gates))))
    one.run(n)
    return case


def float_case(rng: np.random.Generator, dtype: str, rows: int, cols: int, n: int) -> Case:
    cols += -cols % 32 if dtype == "Q8_0" else 0
    case = Case(f"step: float_matmul {dtype} {rows}x{cols}, {n} rows")
    weight = Tensor.of(rng.standard_normal((rows, cols)).astype(np.float32), dtype)
    x, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, cols), rows))
    y = case.close(x.astype(np.float64) @ weight.float32().T.astype(np.float64) + bias)
    program = Program(case)
    operands = case.given(weight.data), NULL, case.given(tiled(bias)), case.given(x), NULL, y
    program.op(OpCode.FLOAT_MATMUL, (DTYPE_IDS[dtype], rows, cols, cols, rows, rows), operands)
    program.run(n)
    return case


def rows_case(rng: np.random.Generator, dtype: str, d: int, n: int) -> Case:
    """EMBED, and QUANTIZE and RMS_NORM of some of its rows."""
    d += -d % 32 if dtype == "Q8_0" else 0
    case = Case(f"step: embed {dtype}, quantize and rms_norm of {n}x{d}")
    table, tokens = Tensor.of(rng.standard_normal((20, d)).astype(np.float32), dtype), rng.integers(0, 20, n)
    x, gain, rows = table.float32()[tokens], rng.standard_normal(d).astype(np.float32), [n - 1, 0, 0]
    there, gains = case.exact(x), case.given(gain)
    program, flags = Program(case), OpFlag.GATHER | OpFlag.OUTPUTS
    program.op(OpCode.EMBED, (20, d, DTYPE_IDS[dtype], d), (case.given(table.data), there))
    program.op(OpCode.RMS_NORM, (d, d, d), (there, gains, case.exact(spec.rms_norm(x[rows], gain))), EPS, flags)
    for g, norm, at in ((gain, OpFlag.NORM, gains), (None, 0, NULL)):
        codes, scales = spec.quantize_per_token(x[rows], g, norm=bool(norm))
        made = case.exact(np.pad(codes, ((0, 0), (0, 9)))), case.exact(scales)
        program.op(OpCode.QUANTIZE, (d, d, d + 9), (there, at, *made), EPS, flags | norm)
    program.run(n, tokens=list(tokens), outputs=rows)
    return case


# ---- attention


class Sequences:
    """Caches of several sequences, and the keys and values that the spec sees in them."""

    def __init__(
        self, case: Case, rng: np.random.Generator, shape: tuple[int, int, int], dtype: str, capacities
    ) -> None:
        self.case, self._rng, self._dtype = case, rng, dtype
        self._heads, self._kv_heads, self._d = shape
        self._k, self._v = ([np.zeros((0, *shape[1:]), np.float32)] * len(capacities) for _ in range(2))
        self._places = [(case.cache(dtype, 2, *shape[1:], capacity), capacity) for capacity in capacities]

    def _stored(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(np.float32) if self._dtype == "F16" else x

    def run(self, counts: dict[int, int], split: bool) -> None:
        """As many new rows of each slot in one step: rope_cache, then attention, with scratch to split it or none."""
        heads, kv_heads, d = self._heads, self._kv_heads, self._d
        rows, width = sum(counts.values()), (heads + 2 * kv_heads) * d
        qkv = self._rng.standard_normal((rows, width)).astype(np.float32)
        outputs, positions, slots, row = [], [], [], 0
        for slot, count in counts.items():
            first, part = len(self._k[slot]), qkv[row : row + count]
            at = np.arange(first, first + count)
            cos, sin = spec.rope_tables(at, d)
            q, k, v = np.split(part.reshape(count, -1, d), [heads, heads + kv_heads], axis=1)
            self._k[slot] = np.concatenate([self._k[slot], self._stored(spec.apply_rope(k, cos, sin))])
            self._v[slot] = np.concatenate([self._v[slot], self._stored(v)])
            attention = spec.attention_int8 if self._dtype == "I8" else spec.attention
            y = attention(spec.apply_rope(q, cos, sin), self._k[slot], self._v[slot], first)
            outputs.append(y.reshape(count, -1))
            positions += list(at)
            slots += [slot] * count
            row += count
        self._attend(qkv, np.concatenate(outputs), positions, slots, split)

    def _attend(self, qkv: np.ndarray, y: np.ndarray, positions: list[int], slots: list[int], split: bool) -> None:
        heads, kv_heads, d, case = self._heads, self._kv_heads, self._d, self.case
        k = heads * d
        tables = [case.given(table) for table in spec.rope_tables(np.arange(max(positions) + 1), d)]
        parts = len(positions) * heads * (max(positions) // spec.CHUNK + 1) if split else 0
        scratch = np.zeros(max(parts * (-(-d // 16) * 16 + 16), 1), np.float32)
        common = (heads, kv_heads, d, 1, DTYPE_IDS[self._dtype])
        program, given = Program(case), case.scratch(qkv)
        program.op(OpCode.ROPE_CACHE, (*common, qkv.shape[1], k, k + kv_heads * d), (given, *tables))
        close = case.close(y, dtype="int8" if self._dtype == "I8" else "float32")
        arrays = given, close, case.scratch(poison(scratch))
        program.op(OpCode.ATTENTION, (*common, qkv.shape[1], k, scratch.size), arrays, d**-0.5)
        program.run(len(positions), positions=positions, slots=slots, caches=self._places)


def attention_case(rng: np.random.Generator, shape: tuple[int, int, int], dtype: str, lengths: Sequence[int]) -> Case:
    """Prompts of several lengths in one step, then steps of one row, of all of them, and of one and a few."""
    case = Case(f"step: attention {dtype}, heads {shape}, {lengths}")
    capacities = [-(-(length + 8) // CACHE_BLOCK) * CACHE_BLOCK for length in lengths]
    sequences = Sequences(case, rng, shape, dtype, capacities)
    slots = range(len(lengths))
    sequences.run(dict(zip(slots, lengths, strict=True)), False)
    for split in (True, False):
        sequences.run(dict.fromkeys(slots, 1), split)
        sequences.run({len(lengths) - 1: 1}, split)
        sequences.run({0: 2, len(lengths) - 1: 1}, split)
    return case


# ---- whole programs


class Weights:
    """A ternary product of a program: its operands on a case."""

    def __init__(self, case: Case, rng: np.random.Generator, fmt: str, *shapes: tuple[int, int]) -> None:
        drawn = [Product(rng, fmt, *shape, 1) for shape in shapes]
        self.codes, self.scales = [m.w for m in drawn], [m.w_scale / 20 for m in drawn]
        both = len(shapes) == 2
        scale = paired(*self.scales) if both else tiled(self.scales[0])
        w = paired(*self.codes) if both else self.codes[0]
        self.numbers = (FORMAT_IDS[fmt], len(scale) if both else shapes[0][0], shapes[0][1], drawn[0].stride)
        self.stride = drawn[0].stride
        self.p = case.given(spec.pack(spec.FORMATS[fmt], w)), case.given(scale), NULL

    def expected(self, x: np.ndarray, scales: np.ndarray, i: int = 0) -> np.ndarray:
        return spec.ternary_matmul(x, scales, self.codes[i], self.scales[i])


def feed_forward_case(rng: np.random.Generator, fmt: str, n: int, hidden: int, ffn: int) -> Case:
    """embed, gate and up, relu2, down, add, norm, heads: exact to the last op, with a private row where n is 1."""
    case = Case(f"program: feed forward {fmt} {hidden}x{ffn}, {n} rows")
    program, rows, private = Program(case), [0, n - 1], OpFlag.PRIVATE if n == 1 else OpFlag(0)
    table, tokens = rng.standard_normal((30, hidden)).astype(np.float32), rng.integers(0, 30, n)
    x, gain = table[tokens], rng.standard_normal(hidden).astype(np.float32)
    gate_up, down = (Weights(case, rng, fmt, *s) for s in ([(ffn, hidden)] * 2, [(hidden, ffn)]))
    codes, scales = spec.quantize_per_token(x, gain)
    y = spec.glu(gate_up.expected(codes, scales, 0), gate_up.expected(codes, scales, 1), "relu2")
    total = x + down.expected(*spec.quantize_per_token(y, norm=False))
    there, gains, middle = case.exact(total), case.given(gain), case.exact(y)
    made, made_down = (
        (case.scratch(np.zeros((n + THREADS, w.stride), np.int8)), case.scratch(np.zeros(n + THREADS, np.float32)))
        for w in (gate_up, down)
    )

    program.op(OpCode.EMBED, (30, hidden, DTYPE_IDS["F32"], hidden), (case.given(table), there))
    numbers = (hidden, hidden, gate_up.stride)
    program.op(OpCode.QUANTIZE, numbers, (there, gains, *made), EPS, OpFlag.NORM | private)
    numbers = (*gate_up.numbers, ffn, ffn, Epilogue.GATE_UP, ACTIVATION_IDS["relu2"])
    program.op(OpCode.MATMUL, numbers, (*gate_up.p, *made, middle), flags=private)
    program.op(OpCode.QUANTIZE, (ffn, ffn, down.stride), (middle, NULL, *made_down), EPS, private)
    numbers = (*down.numbers, hidden, hidden, Epilogue.ADD)
    program.op(OpCode.MATMUL, numbers, (*down.p, *made_down, there), flags=private)
    _heads(program, rng, there, total[rows], gain, gains)
    program.run(n, tokens=list(tokens), outputs=rows)
    return case


def _heads(program: Program, rng: np.random.Generator, there: int, x: np.ndarray, gain: np.ndarray, gains: int) -> None:
    """Heads of bfloat16, 8 and 4 bits on the rows that go on, x [n_outputs, hidden]."""
    case, (n, hidden), gather = program.case, x.shape, OpFlag.GATHER | OpFlag.OUTPUTS
    normed, vocab = spec.rms_norm(x, gain), 300
    middle = case.exact(normed)
    program.op(OpCode.RMS_NORM, (hidden, hidden, hidden), (there, gains, middle), EPS, gather)
    weight = Tensor.of(rng.standard_normal((vocab, hidden)).astype(np.float32), "BF16")
    y = case.close(normed.astype(np.float64) @ weight.float32().T.astype(np.float64))
    numbers = DTYPE_IDS["BF16"], vocab, hidden, hidden, vocab, vocab
    program.op(OpCode.FLOAT_MATMUL, numbers, (case.given(weight.data), NULL, NULL, middle, NULL, y), 0, OpFlag.OUTPUTS)
    codes, scales = spec.quantize_per_token(x, gain)
    for fmt in ("i8", "i4"):
        head = Weights(case, rng, fmt, (vocab, hidden))
        made = case.scratch(np.zeros((n, head.stride), np.int8)), case.scratch(np.zeros(n, np.float32))
        program.op(OpCode.QUANTIZE, (hidden, hidden, head.stride), (there, gains, *made), EPS, gather | OpFlag.NORM)
        y = case.exact(head.expected(codes, scales))
        program.op(OpCode.MATMUL, (*head.numbers, vocab, vocab), (*head.p, *made, y), flags=OpFlag.OUTPUTS)


def attention_block_case(rng: np.random.Generator, fmt: str, dtype: str) -> Case:
    """norm, q, k and v, rope_cache, attention, o, add on batches that grow: the same bits on any thread count."""
    case, hidden, (heads, kv_heads, d), capacity = Case(f"program: attention block {fmt} {dtype}"), 160, (8, 2, 24), 320
    width = (heads + 2 * kv_heads) * d
    qkv, o = Weights(case, rng, fmt, (width, hidden)), Weights(case, rng, fmt, (hidden, heads * d))
    caches = [(case.cache(dtype, 2, kv_heads, d, capacity), capacity) for _ in range(2)]
    tables = [case.given(table) for table in spec.rope_tables(np.arange(capacity), d)]
    scratch = np.zeros(2 * heads * 2 * (-(-d // 16) * 16 + 16), np.float32)
    common = (heads, kv_heads, d, 1, DTYPE_IDS[dtype])
    for positions, slots in (
        (np.r_[:270, :20], [0] * 270 + [1] * 20),
        ([270, 20], [0, 1]),
        ([271], [0]),
        ([272, 273, 21], [0, 0, 1]),
    ):
        n = len(positions)
        private = OpFlag.PRIVATE if n == 1 else OpFlag(0)
        x = case.same(rng.standard_normal((n, hidden)).astype(np.float32))
        turned, mixed = (case.scratch(np.zeros((n, size), np.float32)) for size in (width, heads * d))
        program, made = Program(case), []
        for w in (qkv, o):
            codes = np.zeros((n + THREADS, w.stride), np.int8)
            made.append((case.scratch(codes), case.scratch(np.zeros(n + THREADS, np.float32))))
        numbers = (hidden, hidden, qkv.stride)
        program.op(OpCode.QUANTIZE, numbers, (x, NULL, *made[0]), EPS, OpFlag.NORM | private)
        program.op(OpCode.MATMUL, (*qkv.numbers, width, width), (*qkv.p, *made[0], turned), flags=private)
        numbers = (*common, width, heads * d, (heads + kv_heads) * d)
        program.op(OpCode.ROPE_CACHE, numbers, (turned, *tables))
        arrays = turned, mixed, case.scratch(poison(scratch))
        program.op(OpCode.ATTENTION, (*common, width, heads * d, scratch.size), arrays, d**-0.5)
        program.op(OpCode.QUANTIZE, (heads * d, heads * d, o.stride), (mixed, NULL, *made[1]), EPS, private)
        numbers = (*o.numbers, hidden, hidden, Epilogue.ADD)
        program.op(OpCode.MATMUL, numbers, (*o.p, *made[1], x), flags=private)
        program.run(n, positions=list(positions), slots=slots, caches=caches)
    return case


# ---- refusals


def refused_cases() -> Iterator[Case]:
    """Programs and batches that are refused before anything is written."""
    case = Case("refused: ops")
    a = case.given(np.zeros(4096, np.float32))
    matmul = (0, 16, 16, 16, 16, 16)
    attention = (2, 1, 8, 0, 0, 16, 16, 0)
    for code, n, p in (
        (-1, (1,) * 8, [a] * 6),
        (13, (1,) * 8, [a] * 6),
        (OpCode.EMBED, (10, 4, DTYPE_IDS["I8"], 4), (a, a)),
        (OpCode.EMBED, (10, 48, DTYPE_IDS["Q8_0"], 48), (a, a)),
        (OpCode.EMBED, (10, 32, DTYPE_IDS["Q8_0"] + 1, 32), (a, a)),
        (OpCode.EMBED, (10, 4, 0, -4), (a, a)),
        (OpCode.EMBED, (10, 4, 0, 4), (a,)),
        (OpCode.QUANTIZE, (16, 16, 15), (a, NULL, a, a)),
        (OpCode.QUANTIZE, (0, 16, 16), (a, NULL, a, a)),
        (OpCode.QUANTIZE, (16, 16, 16), (a, NULL, a)),
        (OpCode.RMS_NORM, (0, 16, 16), (a, NULL, a)),
        (OpCode.RMS_NORM, (16, 16, 16), (a,)),
        (OpCode.MATMUL, (2, *matmul[1:]), (a, a, NULL, a, a, a)),
        (OpCode.MATMUL, (5, *matmul[1:]), (a, a, NULL, a, a, a)),
        (OpCode.MATMUL, (1 << 32, *matmul[1:]), (a, a, NULL, a, a, a)),
        (OpCode.MATMUL, (0, 16, 17, 16, 16, 16), (a, a, NULL, a, a, a)),
        (OpCode.MATMUL, (*matmul, 5), (a, a, NULL, a, a, a)),
        (OpCode.MATMUL, (*matmul, Epilogue.ACT, 6), (a, a, NULL, a, a, a)),
        (OpCode.MATMUL, matmul, (NULL, a, NULL, a, a, a)),
        (OpCode.MATMUL, matmul, (a, a, NULL, a, a)),
        (OpCode.FLOAT_MATMUL, (DTYPE_IDS["I8"], *matmul[1:]), (a, NULL, NULL, a, NULL, a)),
        (OpCode.FLOAT_MATMUL, (DTYPE_IDS["Q8_0"], *matmul[1:]), (a, NULL, NULL, a, NULL, a)),
        (OpCode.FLOAT_MATMUL, (*matmul, 5), (a, NULL, NULL, a, NULL, a)),
        (OpCode.FLOAT_MATMUL, matmul, (a, NULL, NULL, NULL, NULL, a)),
        (OpCode.ROPE_CACHE, (3, 2, *attention[2:]), (a, a, a)),
        (OpCode.ROPE_CACHE, (2, 0, *attention[2:]), (a, a, a)),
        (OpCode.ROPE_CACHE, (2, 1, 7, 0, 0, 32, 16, 24), (a, a, a)),
        (OpCode.ROPE_CACHE, (2, 1, 8, 0, DTYPE_IDS["BF16"], 32, 16, 24), (a, a, a)),
        (OpCode.ROPE_CACHE, (2, 1, 8, 0, 4, 32, 16, 24), (a, a, a)),
        (OpCode.ROPE_CACHE, attention, (a, a)),
        (OpCode.ATTENTION, (0, 1, *attention[2:]), (a, a, a)),
        (OpCode.ATTENTION, (3, 2, *attention[2:]), (a, a, a)),
        (OpCode.ATTENTION, (2, 1, 8, 0, DTYPE_IDS["BF16"], 16, 16, 0), (a, a, a)),
        (OpCode.ATTENTION, (2, 1, 0, *attention[3:]), (a, a, a)),
        (OpCode.ATTENTION, attention, (a, a)),
    ):
        program = Program(case)
        program.op(code, n, p, EPS)
        program.run(1, caches=[(a, CACHE_BLOCK)], result=BAD_ARGUMENT)
    case.call("run", -1, 0, NULL, NULL, NULL, 0, NULL, 0, NULL, result=BAD_ARGUMENT)
    yield case
    yield refused_pairs()
    yield refused_batches()


def refused_pairs() -> Case:
    case = Case("refused: pairs of private ops")
    a = case.given(np.zeros(4096, np.float32))
    fields: dict[OpCode, tuple[tuple[int, ...], tuple[int, ...]]] = {
        OpCode.QUANTIZE: ((16, 16, 16), (a, NULL, a, a)),
        OpCode.RMS_NORM: ((16, 16, 16), (a, NULL, a)),
        OpCode.MATMUL: ((0, 16, 16, 16, 16, 16), (a, a, NULL, a, a, a)),
    }
    for ops in (
        [(OpCode.QUANTIZE, OpFlag.PRIVATE)],
        [(OpCode.MATMUL, OpFlag.PRIVATE)],
        [(OpCode.QUANTIZE, OpFlag.PRIVATE), (OpCode.MATMUL, 0)],
        [(OpCode.QUANTIZE, OpFlag.PRIVATE), (OpCode.MATMUL, OpFlag.PRIVATE | OpFlag.OUTPUTS)],
        [(OpCode.RMS_NORM, OpFlag.PRIVATE), (OpCode.MATMUL, OpFlag.PRIVATE)],
        [(OpCode.QUANTIZE, OpFlag.PRIVATE), (OpCode.QUANTIZE, OpFlag.PRIVATE)],
    ):
        program = Program(case)
        for code, flags in ops:
            n, p = fields[code]
            program.op(code, n, p, EPS, flags)
        program.run(1, caches=[(a, CACHE_BLOCK)], result=BAD_ARGUMENT)
    return case


def refused_batches() -> Case:
    case = Case("refused: batches")
    table, x = case.given(np.zeros((10, 4), np.float32)), case.given(np.zeros((2, 4), np.float32))
    program = Program(case)
    program.op(OpCode.EMBED, (10, 4, 0, 4), (table, x))
    place = table, CACHE_BLOCK
    program.run(2, (10, 0), caches=[place], result=BAD_ARGUMENT)
    program.run(2, (-1, 0), caches=[place], result=BAD_ARGUMENT)
    program.run(2, positions=(0, CACHE_BLOCK), caches=[place], result=BAD_ARGUMENT)
    program.run(2, positions=(-1, 0), caches=[place], result=BAD_ARGUMENT)
    program.run(2, slots=(0, 1), caches=[place], result=BAD_ARGUMENT)
    program.run(2, slots=(0, -1), caches=[place], result=BAD_ARGUMENT)
    program.run(2, outputs=(2,), caches=[place], result=BAD_ARGUMENT)
    program.run(2, outputs=(-1,), caches=[place], result=BAD_ARGUMENT)
    program.run(2, caches=[(table, CACHE_BLOCK - 1)], result=BAD_ARGUMENT)
    program.run(2, caches=[(NULL, CACHE_BLOCK)], result=BAD_ARGUMENT)
    program.run(-1, caches=[place], result=BAD_ARGUMENT)
    program.run(0, caches=[place])
    return case


SHAPES = [(4, 2, 18), (3, 1, 2), (6, 6, 64), (20, 5, 128), (9, 1, 6), (2, 1, 80)]


def step_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Every op of a program alone, then programs of all of them."""
    for i, (rows, cols) in enumerate((rows, cols) for rows in UGLY for cols in UGLY):
        yield from (matmul_case(rng, fmt, rows, cols, (1, 3, 17)[i % 3]) for fmt in FORMAT_IDS if fmt != "row_block")
        yield from (float_case(rng, dtype, rows, cols, (1, 5)[i % 2]) for dtype in FLOATS)
    for act in ACTIVATION_IDS:
        yield from (
            activation_case(rng, fmt, rows, n, act) for fmt in ("i2", "base3") for rows, n in ((37, 3), (63, 33))
        )
    yield from (rows_case(rng, dtype, d, 6) for dtype in FLOATS for d in UGLY)
    for dtype in ("F32", "F16", "I8"):
        yield from (attention_case(rng, shape, dtype, (5, 17, 65)) for shape in SHAPES)
        yield attention_case(rng, (2, 1, 18), dtype, (17, 257, 515))
    for fmt in ("i2", "base3"):
        yield from (feed_forward_case(rng, fmt, n, *shape) for n, shape in ((1, (384, 500)), (35, (96, 150))))
        yield from (attention_block_case(rng, fmt, dtype) for dtype in ("F16", "I8"))
    yield from refused_cases()
