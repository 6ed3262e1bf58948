import numpy as np

#: Positions of the cache in a chunk. Chunks are merged in index order, whatever the thread count.
CHUNK = 256


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, first_position: int) -> np.ndarray:
    """o_t = softmax(q_t K^T / sqrt(d)) V over the keys at positions 0 ... first_position + t (arXiv 1706.03762, eq. 1).

    q: float32 [T, heads, d]; k, v: float32 [S, kv_heads, d], S >= first_position + T; query head h reads
    kv head h // (heads / kv_heads). Returns float32 [T, heads, d]. The softmax is computed online (arXiv 2205.14135):
    a chunk of 256 positions gives its maximum m, sum l and weighted values o; chunks merge in index order.
    """
    T, heads, d = q.shape
    group = heads // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # [S, heads, d]
    m = np.full((heads, T), -np.inf, np.float32)
    l, o = np.zeros((heads, T), np.float32), np.zeros((heads, T, d), np.float32)
    for start in range(0, first_position + T, CHUNK):
        stop = min(start + CHUNK, first_position + T)
        scores = np.einsum("thd,shd->hts", q, k[start:stop]) * np.float32(d**-0.5)
        future = np.arange(start, stop)[None, :] > first_position + np.arange(T)[:, None]  # [T, S]
        scores = np.where(future, -np.inf, scores)
        m_new = np.maximum(m, scores.max(-1))
        p = np.exp(scores - m_new[..., None])
        kept = np.exp(m - m_new)
        l = l * kept + p.sum(-1)
        o = o * kept[..., None] + np.einsum("hts,shd->htd", p, v[start:stop])
        m = m_new
    return (o / l[..., None]).transpose(1, 0, 2)
