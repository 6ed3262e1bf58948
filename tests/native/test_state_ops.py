"""The ops of dynamic masks, recurrences and experts against the spec, on every instruction set of this machine."""

from typing import Any

import numpy as np
import pytest

from thrifty import native, spec
from thrifty.checkpoint import Tensor
from thrifty.native import ACTIVATION_IDS, CACHE_BLOCK, DTYPE_IDS, Op, OpCode, Program

if not native.available():
    pytest.skip("no native library", allow_module_level=True)

THREADS = (1, 2, 3, 7)
#: Lengths in which a text is cut into steps: whole, one by one, unevenly.
CUTS = ([40], [1] * 40, [7, 1, 1, 20, 11])


@pytest.fixture(params=native.detected_isas(), autouse=True)
def isa(request):
    """Runs a test on each instruction set that this processor has; one that is not built fails."""
    native.select_isa(request.param)
    yield
    native.select_isa(None)


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = spec.TOLERANCES["float32"]) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


def run(
    op: Op, rows: int, positions: np.ndarray, n_threads: int, states: np.ndarray | None = None, capacity=64
) -> None:
    program = Program([op], rows, 1, n_threads)
    program.positions[:] = positions
    place = (op.p[0].ctypes.data, capacity, 0 if states is None else states.ctypes.data)  # pyright: ignore
    program.run(rows, 0, [place])


def poisoned(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def state(nbytes: int) -> np.ndarray:
    """Memory of a sequence, NaN in every float format, with a guard after it."""
    memory = native.aligned_empty(nbytes + 64)
    memory[:] = 0xFF
    return memory


def in_steps(make: Any, T: int, nbytes: int, capacity: int = 64) -> np.ndarray:
    """Outputs of a text, whose bits depend on neither cuts nor threads. make: the op of rows a ... b, and its y."""
    found = None
    for cuts in CUTS:
        for n_threads in THREADS:
            memory, parts, at = state(nbytes), [], 0
            for count in cuts:
                count = min(count, T - at)
                if count == 0:
                    continue
                op, y = make(at, at + count)
                run(op, count, np.arange(at, at + count), n_threads, memory, capacity)
                parts.append(y)
                at += count
            assert (memory[nbytes:] == 0xFF).all()
            y = np.concatenate(parts)
            found = y if found is None else found
            np.testing.assert_array_equal(y, found)
    assert found is not None
    return found


@pytest.mark.parametrize("d", [1, 3, 63, 257, 500])
def test_mlgru(d):
    rng = np.random.default_rng(d)
    f, c, g = rng.uniform(0, 1, (3, 40, d + 2)).astype(np.float32)

    def make(start: int, stop: int) -> tuple[Op, np.ndarray]:
        y = poisoned(stop - start, d)
        arrays = [np.ascontiguousarray(a[start:stop]) for a in (f, c, g)]
        return Op(OpCode.MLGRU, (d, d + 2, d, 0), (*arrays, y)), y

    expected = g[:, :d] * spec.mlgru(f[:, :d], c[:, :d])
    np.testing.assert_array_equal(in_steps(make, 40, -(-d * 4 // 64) * 64), expected)


@pytest.mark.parametrize("d", [1, 63, 257])
def test_mlgru_with_bounds_and_silu(d):
    rng = np.random.default_rng(d)
    f, c, g = rng.uniform(0, 1, (3, 40, d)).astype(np.float32)
    bounds = rng.uniform(0, 1, d).astype(np.float32)

    def make(start: int, stop: int) -> tuple[Op, np.ndarray]:
        y = poisoned(stop - start, d)
        arrays = [np.ascontiguousarray(a[start:stop]) for a in (f, c, g)]
        return Op(OpCode.MLGRU, (d, d, d, 0, 1), (*arrays, y, bounds)), y

    expected = g * spec.ACTIVATIONS["silu"](spec.mlgru(f, c, bounds=bounds))
    close(in_steps(make, 40, -(-d * 4 // 64) * 64), expected)


@pytest.mark.parametrize(("heads", "groups", "p", "n"), [(1, 1, 1, 1), (3, 3, 18, 18), (4, 2, 63, 5), (6, 1, 16, 33)])
def test_ssd(heads, groups, p, n):
    rng = np.random.default_rng(heads)
    width = max(heads * p, groups * n) + 3
    x, B, C = rng.standard_normal((3, 40, width)).astype(np.float32)
    dt, A = rng.standard_normal((40, heads)).astype(np.float32), -rng.uniform(0.1, 3, heads).astype(np.float32)

    def make(start: int, stop: int) -> tuple[Op, np.ndarray]:
        y = poisoned(stop - start, heads * p)
        arrays = [np.ascontiguousarray(a[start:stop]) for a in (x, B, C, dt)]
        sizes = (heads, groups, p, n, width, heads, heads * p, 64)
        return Op(OpCode.SSD, sizes, (*arrays, A, y)), y

    steps = np.logaddexp(np.float32(0), dt)
    parts = [a[:, : h * w].reshape(40, h, w) for a, h, w in ((x, heads, p), (B, groups, n), (C, groups, n))]
    expected, _ = spec.ssd(parts[0], steps, A, parts[1], parts[2])
    close(in_steps(make, 40, 64 + heads * n * -(-p // 16) * 64), expected.reshape(40, -1))


@pytest.mark.parametrize("shape", [(4, 2, 2, 18), (3, 1, 3, 2), (6, 6, 6, 64), (20, 5, 5, 16), (2, 1, 1, 80)])
@pytest.mark.parametrize("window", [1, 5, 39, 0])
@pytest.mark.parametrize("dtype", ["F32", "F16", "I8"])
def test_dynamic_mask(shape, window, dtype):
    heads, kv_heads, score_heads, d = shape
    rng, T, layer = np.random.default_rng(d), 40, 1
    q, k, v = (rng.standard_normal((T, h, d)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    scores = rng.integers(0, 6, (T, score_heads)).astype(np.float32) / 3  # many ties
    nbytes = 2 * (native.cache_nbytes(dtype, 1, score_heads, d, CACHE_BLOCK) + 8 * score_heads * CACHE_BLOCK)
    width = (heads + 2 * kv_heads) * d + 1

    def make(start: int, stop: int) -> tuple[Op, np.ndarray]:
        rows, y = np.zeros((stop - start, width), np.float32), poisoned(stop - start, heads * d)
        parts = [a[start:stop].reshape(stop - start, -1) for a in (q, k, v)]
        rows[:, : width - 1] = np.concatenate(parts, axis=1)
        at = heads * d, (heads + kv_heads) * d
        sizes = (heads, kv_heads, d, score_heads, window, DTYPE_IDS[dtype], width, layer, 128)
        buffers = (rows, rows[:, at[0] :], rows[:, at[1] :], np.ascontiguousarray(scores[start:stop]), y)
        return Op(OpCode.DYNAMIC_MASK, sizes, buffers, (d**-0.5,)), y

    def stored(x: np.ndarray) -> np.ndarray:
        if dtype != "I8":
            return x.astype({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)
        codes, scale = spec.quantize_per_token(x.reshape(-1, d), norm=False)
        return (codes * scale[:, None]).reshape(x.shape)

    # Over 8 bits, queries are coded as keys are.
    queries = stored(q) if dtype == "I8" else q
    expected = spec.dynamic_mask_attention(queries, stored(k), stored(v), scores, window or None)
    tolerance = spec.TOLERANCES["int8" if dtype == "I8" else "float32"]
    close(in_steps(make, T, 128 + nbytes), expected.reshape(T, -1), tolerance)


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (63, 3), (257, 5)])
def test_key_scores(width, heads):
    rng = np.random.default_rng(width)
    x, weight = rng.standard_normal((9, width + 1)).astype(np.float32), rng.standard_normal((heads, width))
    weight, A, bias = weight.astype(np.float32), *rng.standard_normal((2, heads)).astype(np.float32)
    for b in (bias, None):
        expected = spec.key_scores(x[:, None, :width].astype(np.float64), A, weight, b)
        for n_threads in THREADS:
            y = poisoned(9, heads)
            run(Op(OpCode.KEY_SCORES, (width, heads, width + 1), (x, A, weight, b, y)), 9, np.arange(9), n_threads)
            np.testing.assert_array_equal(y, expected.astype(np.float32))


@pytest.mark.parametrize("d", [2, 18, 64])
@pytest.mark.parametrize(("normed", "turned"), [(True, True), (False, True), (True, False)])
def test_heads(d, normed, turned):
    rng = np.random.default_rng(d)
    x, gains = rng.standard_normal((7, 6, d)).astype(np.float32), rng.standard_normal((2, d)).astype(np.float32)
    cos, sin = spec.rope_tables(np.arange(20), d)
    positions = np.arange(5, 12)
    parts = x[:, :3], x[:, 4:]
    if normed:
        parts = tuple(spec.rms_norm(part, gain) for part, gain in zip(parts, gains, strict=True))
    if turned:
        parts = tuple(spec.apply_rope(part, cos[positions], sin[positions]) for part in parts)
    for n_threads in THREADS:
        y = x.copy()
        tables, gain = (cos, sin) if turned else (None, None), gains if normed else (None, None)
        run(Op(OpCode.HEADS, (3, 2, d, 6 * d, 4 * d), (y, *tables, *gain), (1e-5,)), 7, positions, n_threads)
        close(np.concatenate([y[:, :3], y[:, 4:]], 1), np.concatenate(parts, 1))
        np.testing.assert_array_equal(y[:, 3], x[:, 3])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("heads", "k", "n", "d"), [(1, 1, 1, 1), (2, 5, 3, 63), (1, 64, 16, 257), (3, 7, 7, 16)])
def test_experts(dtype, heads, k, n, d):
    rng = np.random.default_rng(d)
    x, shared, before = rng.standard_normal((3, 9, d)).astype(np.float32)
    scores, factors = rng.standard_normal((9, 2, heads, n)).astype(np.float32), rng.uniform(0, 2, d).astype(np.float32)
    down, up = (Tensor.of(rng.standard_normal((n * n, d)).astype(np.float32), dtype) for _ in range(2))
    sums, numbers = spec.product_key_topk(scores[:, 0], scores[:, 1], k)
    softmax = np.exp(sums - sums.max(-1, keepdims=True))
    softmax = (softmax / softmax.sum(-1, keepdims=True)).reshape(9, -1)
    for norm, scaled in ((0, True), (1, False)):
        weights = softmax / heads if norm else softmax
        act = spec.ACTIVATIONS["silu"]
        mixed = spec.product_key_experts(x, numbers.reshape(9, -1), weights, down.float32(), up.float32(), act)
        expected = before * (factors if scaled else 1) + (shared + mixed)
        for n_threads in THREADS:
            y, scratch = before.copy(), poisoned(9, 4 * heads * k + d + d % 2)
            sizes = (heads, k, n, d, DTYPE_IDS[dtype], ACTIVATION_IDS["silu"], norm, d, scratch.shape[1])
            arrays = (x, scores, down.data, up.data, shared, y, factors if scaled else None, scratch)
            run(Op(OpCode.EXPERTS, sizes, arrays), 9, np.arange(9), n_threads)
            close(y, expected)
