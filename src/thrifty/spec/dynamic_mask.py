import heapq

import numpy as np


def key_scores(v: np.ndarray, A: np.ndarray, dt_weight: np.ndarray, dt_bias: np.ndarray | None = None) -> np.ndarray:
    """b_j = exp(A * softplus(W_dt v_j)): what a key is worth to every query (Wonderful Matrices, arXiv 2412.11834).

    v: float32 [S, kv_heads, d], all heads of a position side by side in v_j; A: float32 [score_heads]; dt_weight:
    [score_heads, kv_heads * d]. Returns float32 [S, score_heads]. softplus(x) = log(1 + e^x).
    """
    dt = v.reshape(len(v), -1) @ dt_weight.T
    if dt_bias is not None:
        dt = dt + dt_bias
    return np.exp(A * np.logaddexp(np.float32(0), dt))


def kept_until(scores: np.ndarray, window: int) -> np.ndarray:
    """e_j: the first query position at which `window` better keys precede it, S where there is none.

    scores: [S]. Key j is active for the queries j ... e_j - 1: a score does not depend on the query, so a key that was
    once pushed out never returns. Of equal scores the newer key is the better one. Returns int64 [S].
    """
    ends = np.full(len(scores), len(scores))
    kept: list[tuple[float, int]] = []
    for j, score in enumerate(scores):
        heapq.heappush(kept, (float(score), j))
        if len(kept) > window:
            ends[heapq.heappop(kept)[1]] = j
    return ends


def dynamic_mask_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scores: np.ndarray, window: int | None, first_position: int = 0
) -> np.ndarray:
    """o_t = softmax(q_t K^T / sqrt(d) + b) V over the `window` best keys up to t (arXiv 2412.11834; 2508.02124).

    q: float32 [T, heads, d] at positions first_position ...; k, v: [S, kv_heads, d], S = first_position + T; scores b:
    [S, score_heads], score_heads kv_heads or heads; a head keeps keys of its own where its scores are its own.
    window=None keeps every key. Returns float32 [T, heads, d].
    """
    T, heads, d = q.shape
    k, v = (np.repeat(t, heads // t.shape[1], axis=1) for t in (k, v))
    b = np.repeat(scores, heads // scores.shape[1], axis=1)  # [S, heads]
    keys, queries = np.arange(len(k)), first_position + np.arange(T)
    y = np.empty_like(q)
    for h in range(heads):
        ends = kept_until(b[:, h], len(k) if window is None else window)
        active = (keys[None] <= queries[:, None]) & (queries[:, None] < ends[None])  # [T, S]
        logits = np.where(active, q[:, h] @ k[:, h].T * np.float32(d**-0.5) + b[:, h], -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        y[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h]
    return y
