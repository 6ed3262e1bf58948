"""The float ops of a layer over plain arrays, bit for bit as a step computes them."""

import numpy as np

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.native._library import aligned_empty, load
from thrifty.native._step import ACTIVATION_IDS, CACHE_BLOCK, DTYPE_IDS, Op, OpCode, Program, cache_nbytes
from thrifty.native._threads import default_threads


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, first_position: int, n_threads: int | None = None
) -> np.ndarray:
    """o_t = softmax(q_t K^T / sqrt(d)) V over the keys at positions 0 ... first_position + t, as `thrifty.spec` has it.

    q: float32 [T, heads, d]; k, v: float32 [S, kv_heads, d], S = first_position + T, d even. Returns float32
    [T, heads, d], the bits of a step over a cache of 32 bits, whatever T and the threads. Raises ThriftyError for
    shapes that do not fit.
    """
    (T, heads, d), (S, kv_heads, _) = q.shape, k.shape
    if v.shape != k.shape or k.shape[2] != d or heads % kv_heads or first_position + T != S:
        raise ThriftyError(
            f"[attention] q, k, v and first_position must fit; got {q.shape}, {k.shape}, {v.shape} and {first_position}"
        )
    if load() is None:
        return spec.attention(q, k, v, first_position)
    threads = default_threads() if n_threads is None else n_threads
    # Positions are in q and k already: the op that fills the cache turns by nothing.
    rows = np.zeros((S, (heads + 2 * kv_heads) * d), np.float32)
    rows[first_position:, : heads * d] = q.reshape(T, -1)
    rows[:, heads * d : (heads + kv_heads) * d] = k.reshape(S, -1)
    rows[:, (heads + kv_heads) * d :] = v.reshape(S, -1)
    cos, sin = np.ones((S, d // 2), np.float32), np.zeros((S, d // 2), np.float32)
    out, scratch = np.empty((T, heads, d), np.float32), np.zeros(1, np.float32)
    shape = (heads, kv_heads, d, 0, DTYPE_IDS["F32"], rows.shape[1])
    fill = Op(OpCode.ROPE_CACHE, (*shape, heads * d, (heads + kv_heads) * d), (rows, cos, sin))
    attend = Op(OpCode.ATTENTION, (*shape, heads * d, 0), (rows[first_position:], out, scratch), (d**-0.5,))
    program = Program((fill, attend), S, 1, threads)
    capacity = -(-S // CACHE_BLOCK) * CACHE_BLOCK
    cache = aligned_empty(cache_nbytes("F32", 1, kv_heads, d, capacity))
    caches = ((cache.ctypes.data, capacity),)
    program.positions[:] = np.arange(S)
    program.run(S, 0, caches, 0, 1)
    program.positions[:T] = np.arange(first_position, S)
    program.run(T, 0, caches, 1, 2)
    return out


def glu(gate: np.ndarray, up: np.ndarray | None, act: str, n_threads: int | None = None) -> np.ndarray:
    """y = act(gate) * up, or act(gate) where up is None (`thrifty.spec.glu`), the bits of a step.

    gate, up: float32 of one shape, contiguous. act: a key of `thrifty.spec.ACTIVATIONS`.
    """
    library = load()
    if library is None:
        return spec.ACTIVATIONS[act](gate) if up is None else spec.glu(gate, up, act)
    if gate.dtype != np.float32 or not gate.flags.c_contiguous or (up is not None and up.shape != gate.shape):
        raise ThriftyError(f"[glu] gate and up must be contiguous float32 of one shape; got {gate.dtype} {gate.shape}")
    y = np.empty_like(gate)
    second = None if up is None else np.ascontiguousarray(up, np.float32)
    status = library.glu(
        *(gate.ctypes.data, None if second is None else second.ctypes.data, ACTIVATION_IDS[act], gate.size),
        *(y.ctypes.data, default_threads() if n_threads is None else n_threads),
    )
    library.check("glu", status)
    return y
