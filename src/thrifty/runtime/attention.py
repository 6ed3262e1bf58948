"""Attention of a few new positions over the cache, chunk by chunk as `spec.attention` defines it."""

import numpy as np

from thrifty.spec import CHUNK


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, out: np.ndarray) -> None:
    """Write softmax(q K^T / sqrt(d)) V for queries at positions first ... first + T - 1.

    q: float32 [T, heads, d]; k, v: float32 [kv_heads, capacity, d], filled up to first + T; out: [T, heads * d].
    Memory grows with T * CHUNK, not with the context.
    """
    T, heads, d = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    queries = q.reshape(T, kv_heads, group, d).transpose(1, 2, 0, 3).reshape(kv_heads, group * T, d)
    scale = np.float32(d**-0.5)
    m = l = o = None
    for start in range(0, first + T, CHUNK):
        stop = min(start + CHUNK, first + T)
        scores = np.matmul(queries, k[:, start:stop].transpose(0, 2, 1))  # [kv_heads, group * T, S]
        scores *= scale
        if T > 1 and stop > first + 1:
            future = np.arange(start, stop) > first + np.arange(T)[:, None]  # [T, S]
            np.copyto(scores.reshape(kv_heads, group, T, stop - start), -np.inf, where=future)
        chunk_max = np.maximum.reduce(scores, -1, keepdims=True)
        new_m = chunk_max if m is None else np.maximum(m, chunk_max)
        scores -= new_m
        p = np.exp(scores, scores)
        chunk_l = np.add.reduce(p, -1, keepdims=True)
        chunk_o = np.matmul(p, v[:, start:stop])  # [kv_heads, group * T, d]
        if m is None or l is None or o is None:
            l, o = chunk_l, chunk_o
        else:
            kept = np.exp(m - new_m)
            l = l * kept + chunk_l
            o = o * kept + chunk_o
        m = new_m
    if o is None or l is None:
        return
    o /= l
    out.reshape(T, kv_heads, group, d)[:] = o.reshape(kv_heads, group, T, d).transpose(2, 0, 1, 3)
