"""The ops of states and experts with what the spec expects of them, as cases for tests/native/driver.cpp."""

from collections.abc import Iterator

import numpy as np
from native_cases import BAD_ARGUMENT, NULL, UGLY, Case, poison
from native_steps import EPS, Program

from thrifty import spec
from thrifty.checkpoint import Tensor
from thrifty.native import ACTIVATION_IDS, CACHE_BLOCK, DTYPE_IDS, OpCode

#: Rows of the steps in which a text of `TEXT` tokens is read.
STEPS, TEXT = ((0, 13), (13, 14), (14, 20)), 20


def _cut(rows: np.ndarray, stride: int, start: int, stop: int) -> np.ndarray:
    """Rows start ... stop - 1 with that stride; the array ends with the last row's last element."""
    wide = np.zeros((stop - start, stride), np.float32)
    wide[:, : rows.shape[1]] = rows[start:stop]
    return wide.ravel()[: (stop - start - 1) * stride + rows.shape[1]]


def _memory(case: Case, nbytes: int) -> int:
    return case.scratch(np.full(nbytes, 0xFF, np.uint8))


def mlgru_case(rng: np.random.Generator, d: int) -> Case:
    case = Case(f"step: mlgru of {d}")
    f, c, g = rng.uniform(0, 1, (3, TEXT, d)).astype(np.float32)
    bounds = rng.uniform(0, 1, d).astype(np.float32)
    plain, bounded = g * spec.mlgru(f, c), g * spec.ACTIVATIONS["silu"](spec.mlgru(f, c, bounds=bounds))
    for silu in (False, True):
        states = _memory(case, -(-d // 16) * 64)
        for start, stop in STEPS:
            program = Program(case)
            given = [case.given(_cut(a, d + 3, start, stop)) for a in (f, c, g)]
            y = case.close(bounded[start:stop]) if silu else case.exact(plain[start:stop])
            last = case.given(bounds) if silu else NULL
            program.op(OpCode.MLGRU, (d, d + 3, d, 0, silu), (*given, y, last))
            program.run(stop - start, positions=range(start, stop), caches=[(states, CACHE_BLOCK, states)])
    return case


def ssd_case(rng: np.random.Generator, heads: int, groups: int, p: int, n: int) -> Case:
    case = Case(f"step: ssd {heads}, {groups} groups, {p}x{n}")
    x, B, C = (rng.standard_normal((TEXT, h, w)).astype(np.float32) for h, w in ((heads, p), (groups, n), (groups, n)))
    dt, A = rng.standard_normal((TEXT, heads)).astype(np.float32), -rng.uniform(0.1, 3, heads).astype(np.float32)
    y, _ = spec.ssd(x, np.logaddexp(np.float32(0), dt), A, B, C)
    y, width = y.reshape(TEXT, -1), max(heads * p, groups * n) + 1
    states = _memory(case, heads * n * -(-p // 16) * 64)
    for start, stop in STEPS:
        program = Program(case)
        given = [case.given(_cut(a.reshape(TEXT, -1), width, start, stop)) for a in (x, B, C)]
        numbers = (heads, groups, p, n, width, heads, heads * p, 0)
        arrays = (*given, case.given(dt[start:stop]), case.given(A), case.close(y[start:stop]))
        program.op(OpCode.SSD, numbers, arrays)
        program.run(stop - start, positions=range(start, stop), caches=[(states, CACHE_BLOCK, states)])
    return case


def dynamic_mask_case(
    rng: np.random.Generator, shape: tuple[int, int, int, int], dtype: str, window: int, unseen: int = 0
) -> Case:
    """The first `unseen` steps bring keys and no queries."""
    heads, kv_heads, score_heads, d = shape
    case = Case(f"step: dynamic_mask {dtype}, heads {shape}, window {window}, {unseen} without queries")
    q, k, v = (rng.standard_normal((TEXT, h, d)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    scores = rng.integers(0, 5, (TEXT, score_heads)).astype(np.float32) / 3
    stored = {"F32": np.float32, "F16": np.float16}[dtype]
    keys, values = (a.astype(stored).astype(np.float32) for a in (k, v))
    y = spec.dynamic_mask_attention(q, keys, values, scores, window or None).reshape(TEXT, -1)
    elements = score_heads * CACHE_BLOCK * (d + -(-d // 16) * 16)
    states = _memory(case, elements * np.dtype(stored).itemsize + 8 * score_heads * CACHE_BLOCK)
    for step, (start, stop) in enumerate(STEPS):
        program, width = Program(case), heads * d
        queries, *given = (case.given(_cut(a.reshape(TEXT, -1), width, start, stop)) for a in (q, k, v))
        numbers = (heads, kv_heads, d, score_heads, window, DTYPE_IDS[dtype], width, 0, 0)
        ends = (NULL, NULL) if step < unseen else (queries, case.close(y[start:stop]))
        arrays = (ends[0], *given, case.given(scores[start:stop]), ends[1])
        program.op(OpCode.DYNAMIC_MASK, numbers, arrays, d**-0.5)
        program.run(stop - start, positions=range(start, stop), caches=[(states, CACHE_BLOCK, states)])
    return case


def heads_case(rng: np.random.Generator, d: int) -> Case:
    """HEADS of three heads and two, and KEY_SCORES of what they lie in."""
    case, n = Case(f"step: heads of {d}, and key scores"), 7
    x, gains = rng.standard_normal((n, 5, d)).astype(np.float32), rng.standard_normal((2, d)).astype(np.float32)
    cos, sin = spec.rope_tables(np.arange(n), d)
    y = np.concatenate([spec.rms_norm(part, g) for part, g in zip((x[:, :3], x[:, 3:]), gains, strict=True)], 1)
    y = spec.apply_rope(y, cos, sin)
    program, there = Program(case), case.close(y.reshape(n, -1), x.reshape(n, -1))
    tables = [case.given(a) for a in (cos, sin, *gains)]
    program.op(OpCode.HEADS, (3, 2, d, 5 * d, 3 * d), (there, *tables), EPS)
    weight, A, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 5 * d), 3, 3))
    scores = case.close(spec.key_scores(y, A / 10, weight / 10, bias))
    arrays = (there, *(case.given(a) for a in (A / 10, weight / 10, bias)), scores)
    program.op(OpCode.KEY_SCORES, (5 * d, 3, 5 * d), arrays)
    program.run(n, positions=range(n))
    return case


def experts_case(rng: np.random.Generator, dtype: str, heads: int, k: int, n: int, d: int) -> Case:
    case, rows = Case(f"step: experts {dtype}, {heads}x{k} of {n}x{n}, {d}"), 5
    x, shared, before = rng.standard_normal((3, rows, d)).astype(np.float32)
    scores, factors = rng.standard_normal((rows, 2, heads, n)).astype(np.float32), rng.uniform(0, 2, d)
    down, up = (Tensor.of(rng.standard_normal((n * n, d)).astype(np.float32), dtype) for _ in range(2))
    sums, numbers = spec.product_key_topk(scores[:, 0], scores[:, 1], k)
    weights = np.exp(sums - sums.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).reshape(rows, -1) / heads
    act, numbers = spec.ACTIVATIONS["silu"], numbers.reshape(rows, -1)
    mixed = spec.product_key_experts(x, numbers, weights, down.float32(), up.float32(), act)
    y = before * factors.astype(np.float32) + (shared + mixed)
    program, scratch = Program(case), np.zeros((rows, 4 * heads * k + d + d % 2), np.float32)
    given = [case.given(a) for a in (x, scores, down.data, up.data, shared)]
    arrays = (*given, case.close(y, before), case.given(factors.astype(np.float32)), case.scratch(poison(scratch)))
    numbers = (heads, k, n, d, DTYPE_IDS[dtype], ACTIVATION_IDS["silu"], 1, d, scratch.shape[1])
    program.op(OpCode.EXPERTS, numbers, arrays)
    program.run(rows)
    return case


def state_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Every op that keeps a state, of experts and of heads."""
    yield from (mlgru_case(rng, d) for d in UGLY)
    yield from (ssd_case(rng, *shape) for shape in ((1, 1, 1, 1), (3, 3, 18, 18), (4, 2, 63, 5)))
    for shape in ((4, 2, 2, 18), (3, 1, 3, 2), (6, 6, 6, 64)):
        yield from (dynamic_mask_case(rng, shape, dtype, w) for dtype in ("F32", "F16") for w in (1, 6, 0))
        yield from (dynamic_mask_case(rng, shape, "F32", 6, unseen) for unseen in (1, 2))
    yield from (heads_case(rng, d) for d in (2, 18, 64))
    for dtype in ("F32", "BF16", "F16"):
        yield from (experts_case(rng, dtype, *shape) for shape in ((1, 1, 1, 1), (2, 5, 3, 63), (1, 64, 16, 257)))
    yield refused_states()


def refused_states() -> Case:
    case = Case("refused: ops of states and experts")
    a = case.given(np.zeros(4096, np.float32))
    experts = (1, 2, 4, 8, 0, 0, 0, 8, 16)
    for code, n, p in (
        (OpCode.HEADS, (1, 1, 7, 16, 8), (a, a, a)),
        (OpCode.HEADS, (1, 1, 8, 16, 8), (a, a)),
        (OpCode.KEY_SCORES, (0, 1, 8), (a, a, a, NULL, a)),
        (OpCode.KEY_SCORES, (8, 1, 8), (a, a, a)),
        (OpCode.DYNAMIC_MASK, (2, 1, 8, 3, 4, 0, 16, 0, 0), (a,) * 5),
        (OpCode.DYNAMIC_MASK, (2, 2, 8, 1, 4, 0, 16, 0, 0), (a,) * 5),
        (OpCode.DYNAMIC_MASK, (2, 1, 8, 1, 4, 1, 16, 0, 0), (a,) * 5),
        (OpCode.DYNAMIC_MASK, (2, 1, 8, 1, 4, 0, 16, 0, 4), (a,) * 5),
        (OpCode.DYNAMIC_MASK, (2, 1, 8, 1, 4, 0, 16, 0, 0), (NULL, a, a, a, a)),
        (OpCode.DYNAMIC_MASK, (2, 1, 8, 1, 4, 0, 16, 0, 0), (a, a, a, a, NULL)),
        (OpCode.DYNAMIC_MASK, (2, 1, 8, 1, 4, 0, 16, 0, 0), (a,) * 5),  # no states
        (OpCode.MLGRU, (8, 8, 8, 0), (a,) * 4),
        (OpCode.MLGRU, (0, 8, 8, 0), (a,) * 4),
        (OpCode.SSD, (2, 0, 8, 8, 16, 2, 16, 0), (a,) * 6),
        (OpCode.SSD, (2, 2, 8, 8, 16, 2, 16, 0), (a,) * 5),
        (OpCode.EXPERTS, (1, 17, *experts[2:]), (a,) * 8),
        (OpCode.EXPERTS, (*experts[:4], 3, *experts[5:]), (a,) * 8),
        (OpCode.EXPERTS, (*experts[:8], 14), (a,) * 8),
        (OpCode.EXPERTS, experts, (a,) * 7),
    ):
        program = Program(case)
        program.op(code, n, p, EPS)
        program.run(1, caches=[(a, CACHE_BLOCK)], result=BAD_ARGUMENT)
    return case
