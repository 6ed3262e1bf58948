"""Every op of a step against the spec, on every instruction set of this machine; outputs are poisoned and guarded."""

import numpy as np
import pytest

from thrifty import ThriftyError, native, spec
from thrifty.checkpoint import Tensor
from thrifty.native import ACTIVATION_IDS, DTYPE_IDS, Epilogue, Op, OpCode, OpFlag, Program

if not native.available():
    pytest.skip("no native library", allow_module_level=True)

FORMAT_IDS = {"i2": 0, "base3": 1, "i8": 3, "i4": 4}
TOLERANCE = spec.TOLERANCES["float32"]
GUARD = 64


@pytest.fixture(params=native.detected_isas())
def isa(request):
    """Runs a test on each instruction set that this processor has; one that is not built fails."""
    native.select_isa(request.param)
    yield request.param
    native.select_isa(None)


class Guarded:
    """A poisoned array between guards that nothing may write."""

    def __init__(self, *shape: int, fill: float = np.nan) -> None:
        size = int(np.prod(shape))
        self._all = np.full(size + 2 * GUARD, 12345.0, np.float32)
        self.array = self._all[GUARD : GUARD + size].reshape(shape)
        self.array[:] = fill

    def check(self) -> None:
        assert (self._all[:GUARD] == 12345).all()
        assert (self._all[-GUARD:] == 12345).all()


def run(op: Op | list[Op], rows: int, n_threads: int = 1, outputs=(), positions=None, slots=None, caches=None) -> None:
    most = max(rows, len(caches or ()), 1)
    program = Program([op] if isinstance(op, Op) else op, most, max(len(outputs), 1), n_threads)
    program.output_rows[: len(outputs)] = outputs
    program.positions[:rows] = 0 if positions is None else positions
    program.slots[:rows] = 0 if slots is None else slots
    memory = np.zeros(64, np.uint8)
    program.run(rows, len(outputs), caches or [(memory.ctypes.data, native.CACHE_BLOCK)])


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


def activated(name: str, x: np.ndarray) -> np.ndarray:
    return spec.ACTIVATIONS[name](x)


def tiled(values: np.ndarray, order: list[int] | None = None) -> np.ndarray:
    """Rows padded to tiles of 16, the tiles in `order` or as they are."""
    rows = -(-len(values) // 16) * 16
    padded = np.zeros((rows, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    if order is None:
        return padded
    return padded.reshape(-1, 16, *values.shape[1:])[order].reshape(-1, *values.shape[1:])


class TestMatmul:
    @staticmethod
    def make(fmt: str, rows: int, cols: int, n: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        most = max(spec.FORMATS[fmt].codes)
        w = rng.integers(-most, most + 1, (rows, cols)).astype(np.int8)
        width = spec.FORMATS[fmt].padded(rows, cols)[1]
        x = np.zeros((n, width), np.int8)
        x[:, :cols] = rng.integers(-127, 128, (n, cols))
        scales = rng.uniform(0.1, 2, n).astype(np.float32)
        w_scale, bias = rng.uniform(0.1, 2, rows).astype(np.float32), rng.normal(size=rows).astype(np.float32)
        return w, w_scale, bias, x, scales

    @pytest.mark.parametrize("fmt", FORMAT_IDS)
    @pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 63), (63, 257), (257, 500), (40, 1003)])
    def test_store_add_and_multiply(self, isa, fmt, rows, cols):
        for n in (1, 3, 17):
            w, w_scale, bias, x, scales = self.make(fmt, rows, cols, n)
            expected = spec.ternary_matmul(x[:, :cols], scales, w, w_scale, bias)
            packed, scale, biases = (
                native.pack(fmt, tiled(w)),
                tiled(w_scale),
                tiled(bias),
            )
            for threads in (1, 2, 3, 7):
                wanted = {Epilogue.STORE: expected, Epilogue.ADD: 0.5 + expected, Epilogue.MULTIPLY: 0.5 * expected}
                for epilogue, want in wanted.items():
                    start = np.nan if epilogue == Epilogue.STORE else 0.5
                    y = Guarded(n, rows + 5, fill=start)
                    numbers = (FORMAT_IDS[fmt], rows, cols, x.shape[1], rows + 5, rows, epilogue, 0)
                    run(Op(OpCode.MATMUL, numbers, (packed, scale, biases, x, scales, y.array)), n, threads)
                    y.check()
                    np.testing.assert_array_equal(y.array[:, :rows], want)
                    np.testing.assert_array_equal(y.array[:, rows:], np.full((n, 5), start, np.float32))

    @pytest.mark.parametrize("act", ACTIVATION_IDS)
    @pytest.mark.parametrize("n", [3, 37])
    def test_activation_and_gate(self, isa, act, n):
        rows, cols = 37, 90
        order = [0, 3, 1, 4, 2, 5]
        for fmt in ("i2", "base3"):
            gate, g_scale, g_bias, x, scales = self.make(fmt, rows, cols, n)
            up, u_scale, u_bias, _, _ = self.make(fmt, rows, cols, n, seed=1)
            scales = scales / 50  # keeps the gate where activations bend
            gates = spec.ternary_matmul(x[:, :cols], scales, gate, g_scale, g_bias)
            ups = spec.ternary_matmul(x[:, :cols], scales, up, u_scale, u_bias)

            def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
                return tiled(np.concatenate([tiled(a), tiled(b)]), order)

            packed, scale, bias = native.pack(fmt, both(gate, up)), both(g_scale, u_scale), both(g_bias, u_bias)
            for threads in (1, 2, 3, 7):
                y = Guarded(n, rows)
                numbers = (FORMAT_IDS[fmt], 96, cols, x.shape[1], rows, rows, Epilogue.GATE_UP, ACTIVATION_IDS[act])
                run(Op(OpCode.MATMUL, numbers, (packed, scale, bias, x, scales, y.array)), n, threads)
                y.check()
                close(y.array, spec.glu(gates, ups, act))
            y = Guarded(n, rows)
            packed = native.pack(fmt, tiled(gate))
            numbers = (FORMAT_IDS[fmt], 48, cols, x.shape[1], rows, rows, Epilogue.ACT, ACTIVATION_IDS[act])
            arrays = (packed, tiled(g_scale), tiled(g_bias), x, scales, y.array)
            run(Op(OpCode.MATMUL, numbers, arrays), n, 2)
            close(y.array, activated(act, gates))

    @pytest.mark.parametrize("fmt", FORMAT_IDS)
    def test_saturated_codes(self, isa, fmt):
        rows, cols = 20, 5000
        most = max(spec.FORMATS[fmt].codes)
        for sign in (1, -1):
            w, x = np.full((rows, cols), sign * most, np.int8), np.full((1, cols), -128, np.int8)
            scale, one = np.ones(rows, np.float32), np.ones(1, np.float32)
            y = native.PackedMatrix.from_codes(w, fmt).matmul(x, one, scale)
            np.testing.assert_array_equal(y, spec.ternary_matmul(x, one, w, scale))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "Q8_0"])
class TestFloats:
    @pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 63), (18, 257), (63, 500)])
    def test_product(self, isa, dtype, rows, cols):
        rng, cols = np.random.default_rng(0), cols + (-cols % 32 if dtype == "Q8_0" else 0)
        weight = Tensor.of(rng.normal(size=(rows, cols)).astype(np.float32), dtype)
        bias = rng.normal(size=rows).astype(np.float32)
        x = rng.normal(size=(9, cols)).astype(np.float32)
        expected = x.astype(np.float64) @ weight.float32().T.astype(np.float64) + bias
        alone = None
        for n in (1, 2, 9):
            for threads in (1, 3):
                y = Guarded(n, rows)
                numbers = (DTYPE_IDS[dtype], rows, cols, cols, rows, rows, Epilogue.STORE, 0)
                arrays = (weight.data, None, tiled(bias), x, None, y.array)
                run(Op(OpCode.FLOAT_MATMUL, numbers, arrays), n, threads)
                y.check()
                close(y.array, expected[:n])
                alone = y.array[:1] if alone is None else alone
                np.testing.assert_array_equal(y.array[:1], alone)

    def test_embedding(self, isa, dtype):
        d = 96 if dtype == "Q8_0" else 33
        table = Tensor.of(np.random.default_rng(0).normal(size=(20, d)).astype(np.float32), dtype)
        y = Guarded(3, d)
        op = Op(OpCode.EMBED, (20, d, DTYPE_IDS[dtype], d), (table.data, y.array))
        program = Program([op], 3, 1, 2)
        program.tokens[:] = [19, 0, 7]
        program.run(3, 0, [(y.array.ctypes.data, 64)])
        y.check()
        np.testing.assert_array_equal(y.array, table.float32()[[19, 0, 7]])

    def test_a_product_has_the_bits_of_the_widened_one(self, isa, dtype):
        rng = np.random.default_rng(3)
        weight = Tensor.of(rng.normal(size=(50, 160)).astype(np.float32), dtype)
        x, ys = rng.normal(size=(5, 160)).astype(np.float32), []
        for stored in (weight, Tensor.of(weight.float32())):
            ys.append(Guarded(5, 50))
            numbers = (DTYPE_IDS[stored.dtype], 50, 160, 160, 50, 50)
            run(Op(OpCode.FLOAT_MATMUL, numbers, (stored.data, None, None, x, None, ys[-1].array)), 5, 2)
        np.testing.assert_array_equal(ys[0].array, ys[1].array)


@pytest.mark.parametrize("d", [1, 3, 63, 257, 500])
def test_norms_of_gathered_rows(isa, d):
    rng = np.random.default_rng(d)
    x, gain = rng.normal(size=(6, d + 3)).astype(np.float32), rng.normal(size=d).astype(np.float32)
    rows = [5, 0, 0, 3]
    flags = OpFlag.GATHER | OpFlag.OUTPUTS
    for threads in (1, 2, 3, 7):
        y, codes, scales = Guarded(4, d), np.full((4, d + 9), 99, np.int8), np.zeros(4, np.float32)
        norm = Op(OpCode.RMS_NORM, (d, d + 3, d), (x, gain, y.array), (1e-5,), flags)
        quantize = Op(OpCode.QUANTIZE, (d, d + 3, d + 9), (x, gain, codes, scales), (1e-5,), flags | OpFlag.NORM)
        run([norm, quantize], 6, threads, rows)
        y.check()
        np.testing.assert_array_equal(y.array, spec.rms_norm(x[rows, :d], gain, 1e-5))
        expected = spec.quantize_per_token(x[rows, :d], gain, 1e-5)
        np.testing.assert_array_equal(codes[:, :d], expected[0])
        np.testing.assert_array_equal(scales, expected[1])
        assert (codes[:, d:] == 0).all()


def test_a_private_row_is_made_by_the_threads_that_need_it(isa):
    x = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    codes, scales = np.full((3, 64), 99, np.int8), np.zeros(3, np.float32)
    w = np.random.default_rng(1).integers(-1, 2, (5000, 50)).astype(np.int8)
    packed, scale, y = native.pack("i2", w), np.ones(5008, np.float32), Guarded(1, 5000)
    quantize = Op(OpCode.QUANTIZE, (50, 50, 64), (x, None, codes, scales), (1e-5,), OpFlag.PRIVATE)
    arrays = (packed, scale, None, codes, scales, y.array)
    run([quantize, Op(OpCode.MATMUL, (0, 5000, 50, 64, 5000, 5000), arrays, flags=OpFlag.PRIVATE)], 1, 3)
    y.check()
    x_codes, x_scales = spec.quantize_per_token(x, norm=False)
    np.testing.assert_array_equal(y.array, spec.ternary_matmul(x_codes, x_scales, w, 1.0))
    with pytest.raises(ThriftyError, match="step"):
        run(quantize, 1, 3)


class Sequence:
    """A cache, and the keys and values that the spec sees in it."""

    def __init__(self, dtype: str, kv_heads: int, d: int, capacity: int) -> None:
        self.dtype = dtype
        nbytes = native.cache_nbytes(dtype, 2, kv_heads, d, capacity)
        self.memory = native.aligned_empty(nbytes + 64)
        self.memory[:] = 0xFF  # NaN in every float format
        self.nbytes = nbytes
        self.place = self.memory.ctypes.data, capacity

    def stored(self, x: np.ndarray) -> np.ndarray:
        """Values float32 [T, kv_heads, d] after a stay in the cache."""
        return x.astype(np.float16).astype(np.float32) if self.dtype == "F16" else x

    def check(self) -> None:
        assert (self.memory[self.nbytes :] == 0xFF).all()


SHAPES = [(4, 2, 18), (3, 1, 2), (6, 6, 64), (20, 5, 128), (9, 1, 6), (2, 1, 80)]


class TestAttention:
    @staticmethod
    def ops(shape, dtype: str, qkv: np.ndarray, y: np.ndarray, cos, sin, scratch) -> list[Op]:
        heads, kv_heads, d = shape
        common = (heads, kv_heads, d, 1, DTYPE_IDS[dtype], qkv.shape[1])
        k = heads * d + 3
        rope = Op(OpCode.ROPE_CACHE, (*common, k, k + kv_heads * d), (qkv, cos, sin))
        attention = (qkv, y, scratch)
        return [rope, Op(OpCode.ATTENTION, (*common, y.shape[1], scratch.size), attention, (d**-0.5,))]

    def attend(self, shape, dtype, parts, n_threads: int, qkv, places, split: bool = True) -> np.ndarray:
        """parts: (slot, first position, rows) of each sequence in the batch."""
        heads, _, d = shape
        rows = sum(n for _, _, n in parts)
        cos, sin = spec.rope_tables(np.arange(1000), d)
        y, scratch = Guarded(rows, heads * d), Guarded(3 * heads * 8 * (-(-d // 16) * 16 + 16) if split else 1)
        positions = np.concatenate([np.arange(first, first + n) for _, first, n in parts])
        slots = np.concatenate([np.full(n, slot) for slot, _, n in parts])
        ops = self.ops(shape, dtype, qkv.copy(), y.array, cos, sin, scratch.array)
        run(ops, rows, n_threads, (), positions, slots, places)
        y.check()
        scratch.check()
        return y.array

    @pytest.mark.parametrize("dtype", ["F32", "F16", "I8"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equals_the_spec(self, isa, dtype, shape):
        heads, kv_heads, d = shape
        rng = np.random.default_rng(0)
        sequence = Sequence(dtype, kv_heads, d, 640)
        length = 600 if d < 100 else 300
        width = (heads + 2 * kv_heads) * d + 3
        qkv = rng.normal(size=(length, width)).astype(np.float32)
        cos, sin = spec.rope_tables(np.arange(length), d)
        q, k = qkv[:, : heads * d].reshape(length, heads, d), qkv[:, heads * d + 3 :][:, : kv_heads * d]
        q, k = spec.apply_rope(q, cos, sin), spec.apply_rope(k.reshape(length, kv_heads, d), cos, sin)
        v = qkv[:, heads * d + 3 + kv_heads * d :].reshape(length, kv_heads, d)
        exactly = spec.attention_int8 if dtype == "I8" else spec.attention
        expected = exactly(q, sequence.stored(k), sequence.stored(v), 0).reshape(length, -1)
        got = []
        for first, stop in ((0, 1), (1, 64), (64, 257), (257, length - 1), (length - 1, length)):
            part = [(0, first, stop - first)]
            threads = 2 if first % 2 else 3
            got.append(self.attend(shape, dtype, part, threads, qkv[first:stop], [sequence.place]))
        sequence.check()
        close(np.concatenate(got), expected, spec.TOLERANCES["int8" if dtype == "I8" else "float32"])

    @pytest.mark.parametrize("dtype", ["F16", "I8"])
    def test_bits_depend_on_neither_threads_nor_batch(self, isa, dtype):
        shape = heads, kv_heads, d = 8, 2, 48
        rng = np.random.default_rng(1)
        width = (heads + 2 * kv_heads) * d + 3
        sequences = [Sequence(dtype, kv_heads, d, 640) for _ in range(3)]
        places = [s.place for s in sequences]
        lengths = (17, 300, 600)
        for slot, n in enumerate(lengths):
            self.attend(shape, dtype, [(slot, 0, n)], 1, rng.normal(size=(n, width)).astype(np.float32), places)
        new = rng.normal(size=(3, width)).astype(np.float32)
        alone = [self.attend(shape, dtype, [(i, n, 1)], 1, new[i : i + 1], places) for i, n in enumerate(lengths)]
        parts = [(i, n, 1) for i, n in enumerate(lengths)]
        for threads in (1, 2, 3, 7):
            for split in (True, False):
                together = self.attend(shape, dtype, parts, threads, new, places, split)
                np.testing.assert_array_equal(together, np.concatenate(alone))
                one = self.attend(shape, dtype, parts[2:], threads, new[2:], places, split)
                np.testing.assert_array_equal(one, alone[2])

    @pytest.mark.parametrize("dtype", ["F32", "F16", "I8"])
    @pytest.mark.parametrize("shape", [(8, 2, 48), (20, 5, 128), (6, 6, 18), (9, 1, 80), (4, 1, 300)])
    def test_a_stretch_has_the_bits_of_its_rows(self, isa, dtype, shape):
        heads, kv_heads, d = shape
        rng = np.random.default_rng(2)
        width = (heads + 2 * kv_heads) * d + 3
        before, rows = 250, 150
        # Wide enough a step for blocks of queries with one thread, and narrower ones with more.
        stretch = rng.normal(size=(before + rows, width)).astype(np.float32)
        sequence, alone = Sequence(dtype, kv_heads, d, 448), Sequence(dtype, kv_heads, d, 448)
        first = [
            self.attend(shape, dtype, [(0, i, 1)], 1, stretch[i : i + 1], [alone.place]) for i in range(len(stretch))
        ]
        for threads in (1, 2, 3, 7):
            sequence.memory[:] = 0xFF
            parts = ((0, before), (before, 3), (before + 3, rows - 3)) if threads > 1 else ((0, len(stretch)),)
            got = [
                self.attend(shape, dtype, [(0, start, n)], threads, stretch[start : start + n], [sequence.place])
                for start, n in parts
            ]
            np.testing.assert_array_equal(np.concatenate(got), np.concatenate(first))
            sequence.check()


def test_a_head_that_eight_bits_do_not_take():
    assert native.cache_nbytes("I8", 1, 1, 1024, 64) > 0
    with pytest.raises(ThriftyError, match="1024"):
        native.cache_nbytes("I8", 1, 1, 1026, 64)


class TestRefusals:
    def op(self) -> Op:
        table, x = np.zeros((10, 4), np.float32), np.zeros((2, 4), np.float32)
        return Op(OpCode.EMBED, (10, 4, 0, 4), (table, x))

    @pytest.mark.parametrize(
        ("field", "value"), [("tokens", 10), ("tokens", -1), ("positions", 64), ("positions", -1), ("slots", 1)]
    )
    def test_rows_out_of_range(self, field, value):
        program = Program([self.op()], 2, 1, 1)
        getattr(program, field)[0] = value
        memory = np.zeros(8)
        with pytest.raises(ThriftyError, match="step"):
            program.run(2, 0, [(memory.ctypes.data, 64)])

    def test_outputs_out_of_range(self):
        program = Program([self.op()], 2, 1, 1)
        program.output_rows[0] = 2
        with pytest.raises(ThriftyError, match="step"):
            program.run(2, 1, [(program.tokens.ctypes.data, 64)])

    def test_more_than_the_program_takes(self):
        program = Program([self.op()], 2, 1, 1)
        place = (program.tokens.ctypes.data, 64)
        for rows, outputs, caches in ((3, 0, 1), (2, 2, 1), (2, 0, 3)):
            with pytest.raises(ThriftyError, match="takes 2 rows"):
                program.run(rows, outputs, [place] * caches)

    def test_an_op_without_its_arrays(self):
        program = Program([Op(OpCode.MATMUL, (0, 16, 16, 16, 16, 16), (None,))], 1, 1, 1)
        with pytest.raises(ThriftyError, match="step"):
            program.run(1, 0, [(program.tokens.ctypes.data, 64)])


@pytest.mark.parametrize("fmt", ["i2", "base3"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 63), (64, 257), (130, 500)])
def test_repack_equals_pack(fmt, rows, cols):
    codes = np.random.default_rng(0).integers(-1, 2, (rows, cols)).astype(np.int8)
    tiles = -(-rows // 16)
    expected = native.pack(fmt, codes)
    packed = np.full((2 * tiles + 1, *expected.shape[1:]), 255, np.uint8)
    native.repack(fmt, spec.pack(spec.ROW_BLOCK, codes), rows, packed, 1, 2, 3)
    np.testing.assert_array_equal(packed[1::2], expected)
    assert (packed[::2] == 255).all()


def test_repack_refuses_a_digit_without_a_code():
    bad = np.full((4, 16), 0b11, np.uint8)
    with pytest.raises(ThriftyError, match="none of the codes of its format"):
        native.repack("i2", bad, 16, np.zeros((1, 1, 64), np.uint8), 0, 1, 1)


@pytest.mark.parametrize(("dtype", "storage"), [("F32", np.float32), ("F16", np.float16), ("I8", np.int8)])
@pytest.mark.parametrize(("head_dim", "count"), [(2, 1), (48, 63), (20, 65), (16, 128)])
def test_positions_of_a_cache_come_back_from_plain_arrays(dtype, storage, head_dim, count):
    rng, shape = np.random.default_rng(0), (3, 2, count, head_dim)
    k, v = (rng.integers(-100, 100, shape).astype(storage) for _ in range(2))
    scales = (rng.random(shape[:3], np.float32), rng.random(shape[:3], np.float32)) if dtype == "I8" else None
    capacity = 128
    nbytes = native.cache_nbytes(dtype, 3, 2, head_dim, capacity)
    memory = native.aligned_empty(nbytes + GUARD)
    memory[:] = 77
    place = memory.ctypes.data, capacity
    native.cache_copy(dtype, place, k, v, scales, into=True)
    back = (np.zeros_like(k), np.zeros_like(v))
    back_scales = (np.zeros_like(scales[0]), np.zeros_like(scales[1])) if scales else None
    native.cache_copy(dtype, place, *back, back_scales, into=False)
    np.testing.assert_array_equal(back, (k, v))
    np.testing.assert_array_equal(back_scales or (), scales or ())
    assert (memory[nbytes:] == 77).all()


def test_arrays_that_do_not_fit_a_cache_are_refused():
    memory = native.aligned_empty(native.cache_nbytes("F32", 1, 2, 4, 64))
    place, k = (memory.ctypes.data, 64), np.zeros((1, 2, 65, 4), np.float32)
    narrow = k.astype(np.float16)
    for keys, values in ((k, k), (k[:, :, :3], k[:, :, :3]), (k, k[:, :, :3].copy()), (narrow, narrow)):
        with pytest.raises(ThriftyError, match="step"):
            native.cache_copy("F32", place, keys, values, None, into=True)
