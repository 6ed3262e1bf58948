"""What mixes tokens and chooses experts over plain arrays, bit for bit as a step computes it.

Each runs a program of a step and needs the native library: without one there is nothing whose bits these would be.
"""

from collections.abc import Sequence

import numpy as np

from thrifty.errors import ThriftyError
from thrifty.native._library import aligned_empty
from thrifty.native._step import ACTIVATION_IDS, CACHE_BLOCK, DTYPE_IDS, Op, OpCode, Place, Program, cache_nbytes
from thrifty.native._threads import default_threads

_TILE_ROWS = 16


def float_matmul(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """y = x W^T + b in float32. x: float32 [n, cols]; weight: [rows, cols]; bias: [rows] or None. Returns [n, rows]."""
    (n, cols), rows = x.shape, len(weight)
    if weight.shape != (rows, cols) or (bias is not None and bias.shape != (rows,)):
        raise ThriftyError(
            f"[float_matmul] x and weight must be [n, cols], [rows, cols]; got {x.shape}, {weight.shape}"
        )
    padded = None
    if bias is not None:
        padded = np.zeros(_round_up(rows, _TILE_ROWS), np.float32)
        padded[:rows] = bias
    y = np.empty((n, rows), np.float32)
    arrays = (_rows(weight), None, padded, _rows(x), None, y)
    _run([Op(OpCode.FLOAT_MATMUL, (DTYPE_IDS["F32"], rows, cols, cols, rows, rows), arrays)], n)
    return y


def dynamic_mask_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scores: np.ndarray, window: int | None
) -> np.ndarray:
    """o_t = softmax(q_t K^T / sqrt(d) + b) V over the `window` best keys up to t, as `thrifty.spec` has it.

    q: float32 [T, heads, d], the last T of S positions; k, v: [S, kv_heads, d]; scores b: [S, score_heads]; window=None
    keeps every key. Returns float32 [T, heads, d].
    """
    (T, heads, d), (S, kv_heads, _), score_heads = q.shape, k.shape, scores.shape[1]
    if v.shape != k.shape or k.shape[2] != d or score_heads not in (kv_heads, heads) or heads % kv_heads or T > S:
        raise ThriftyError(
            f"[dynamic_mask_attention] q, k, v and scores must fit; got {q.shape}, {k.shape}, {v.shape}, {scores.shape}"
        )
    first, rows = S - T, np.zeros((S, (heads + 2 * kv_heads) * d), np.float32)
    at_k, at_v = heads * d, (heads + kv_heads) * d
    rows[first:, :at_k] = q.reshape(T, -1)
    rows[:, at_k:at_v] = k.reshape(S, -1)
    rows[:, at_v:] = v.reshape(S, -1)
    scores, out = _rows(scores), np.empty((T, heads, d), np.float32)
    sizes = (heads, kv_heads, d, score_heads, window or 0, DTYPE_IDS["F32"], rows.shape[1], 0, 0)
    keys = (rows[:, at_k:], rows[:, at_v:], scores)
    new_keys = (rows[first:, at_k:], rows[first:, at_v:], scores[first:])
    ops = [
        Op(OpCode.DYNAMIC_MASK, sizes, (None, *keys, None), (d**-0.5,)),
        Op(OpCode.DYNAMIC_MASK, sizes, (rows[first:], *new_keys, out), (d**-0.5,)),
    ]
    slots = _round_up(min(window or S, S), CACHE_BLOCK)
    states = aligned_empty(cache_nbytes("F32", 1, score_heads, d, slots) + 8 * score_heads * slots)
    program, place = _program(ops, S), _place(states, S)
    if first:
        program.positions[:first] = np.arange(first)
        program.run(first, 0, [place], 0, 1)
    program.positions[:T] = np.arange(first, S)
    program.run(T, 0, [place], 1, 2)
    return out


def ssd(
    x: np.ndarray, dt: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, state: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """h_t = exp(A s_t) h_{t-1} + s_t x_t B_t^T, y_t = h_t C_t, s = softplus(dt), as `thrifty.spec` has it.

    x: float32 [T, heads, p]; dt: [T, heads]; A: [heads]; B, C: [T, groups, n]; state: [heads, p, n], zeros by default.
    Returns y [T, heads, p] and the state after it.
    """
    (T, heads, p), (_, groups, n) = x.shape, B.shape
    kept = (heads, p, n)
    fits = dt.shape == (T, heads) and A.shape == (heads,) and len(B) == T and B.shape == C.shape and not heads % groups
    if not fits or (state is not None and state.shape != kept):
        raise ThriftyError(f"[ssd] x, dt, A, B, C must fit; got {x.shape}, {dt.shape}, {A.shape}, {B.shape}, {C.shape}")
    rows = np.concatenate([part.reshape(T, -1) for part in (x, B, C)], 1, dtype=np.float32)
    at_b, at_c = heads * p, heads * p + groups * n
    y, lanes = np.empty((T, heads, p), np.float32), _round_up(p, 16)
    memory = aligned_empty(4 * heads * n * lanes).view(np.float32).reshape(heads, n, lanes)
    memory[:] = 0
    if state is not None:
        memory[:, :, :p] = state.transpose(0, 2, 1)
    sizes = (heads, groups, p, n, rows.shape[1], heads, heads * p, 0)
    arrays = (rows, rows[:, at_b:], rows[:, at_c:], _rows(dt), _rows(A), y)
    program = _program([Op(OpCode.SSD, sizes, arrays)], T)
    # A state begins anew at position 0 alone.
    program.positions[:] = np.arange(1, T + 1)
    program.run(T, 0, [_place(memory, T + 1)])
    return y, np.ascontiguousarray(memory[:, :, :p].transpose(0, 2, 1))


def routed_experts(
    x: np.ndarray, scores: np.ndarray, down: np.ndarray, up: np.ndarray, k: int, act: str, norm: bool
) -> np.ndarray:
    """sum_s w_s act(x . d_s) u_s over each head's k best experts, w the softmax of their sums.

    x: float32 [rows, d]; scores: [rows, 2, heads, n], of both halves of a key; down, up: [n * n, d]; k: at most
    `MOST_CHOSEN`; norm: divide w by its sum over all heads. Returns float32 [rows, d].
    """
    (rows, d), (_, _, heads, n) = x.shape, scores.shape
    if scores.shape != (rows, 2, heads, n) or down.shape != (n * n, d) or up.shape != down.shape:
        raise ThriftyError(
            f"[routed_experts] x, scores and tables must fit; got {x.shape}, {scores.shape}, {down.shape}, {up.shape}"
        )
    scratch = np.zeros((rows, 4 * heads * k + d + d % 2), np.float32)
    y, shared = np.zeros((rows, d), np.float32), np.zeros((rows, d), np.float32)
    sizes = (heads, k, n, d, DTYPE_IDS["F32"], ACTIVATION_IDS[act], norm, d, scratch.shape[1])
    arrays = (_rows(x), _rows(scores), _rows(down), _rows(up), shared, y, None, scratch)
    _run([Op(OpCode.EXPERTS, sizes, arrays)], rows)
    return y


def _program(ops: Sequence[Op], rows: int) -> Program:
    return Program(ops, max(rows, 1), 1, default_threads())


def _run(ops: Sequence[Op], rows: int) -> None:
    """A program that keeps nothing."""
    _program(ops, rows).run(rows, 0, [_place(aligned_empty(CACHE_BLOCK), CACHE_BLOCK)])


def _place(states: np.ndarray, positions: int) -> Place:
    return states.ctypes.data, _round_up(positions, CACHE_BLOCK), states.ctypes.data


def _rows(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
