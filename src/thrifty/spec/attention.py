import numpy as np

from thrifty.spec.quantize_per_token import quantize_per_token

#: Positions of the cache in a chunk. Chunks are merged in index order, whatever the thread count.
CHUNK = 256
#: Largest code of a weight over an 8-bit cache: a sum of CHUNK products with codes of 8 bits stays in int32.
MOST_WEIGHT = 32512


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


def attention_int8(q: np.ndarray, k: np.ndarray, v: np.ndarray, first_position: int) -> np.ndarray:
    """`attention` over a cache of 8 bits: scores and weighted values are exact integers, with a scale for each.

    q, k and v are quantised per token and head as activations are: x = c s. In a chunk of 256 positions

        score_ts = float32(c_qt . c_ks) (s_qt / sqrt(d)) s_ks
        w_ts     = exp(score_ts - m_t) s_vs, m_t the chunk's largest score,
        o_t      = float32(sum_s round(w_ts (1 / u_t)) c_vs) u_t, u_t the largest w_ts / 32512,

    and l_t sums the exponentials as they are. Chunks merge as in `attention`. A weight is off by u_t / 2 at most;
    what is lost is lost to the codes of q, k and v. Shapes are those of `attention`.
    """
    T, heads, d = q.shape
    group = heads // k.shape[1]
    (q_codes, q_scales), (k_codes, k_scales), (v_codes, v_scales) = (_quantize_heads(x) for x in (q, k, v))
    m = np.full((heads, T), -np.inf, np.float32)
    l, o = np.zeros((heads, T), np.float32), np.zeros((heads, T, d), np.float32)
    for start in range(0, first_position + T, CHUNK):
        chunk = slice(start, min(start + CHUNK, first_position + T))
        keys, values = (np.repeat(x[chunk], group, axis=1) for x in (k_codes, v_codes))  # [S, heads, d]
        s_k, s_v = (np.repeat(x[chunk], group, axis=1).T[:, None] for x in (k_scales, v_scales))  # [heads, 1, S]
        scores = np.einsum("thd,shd->hts", q_codes, keys).astype(np.float32)
        scores = scores * (q_scales.T * np.float32(d**-0.5))[..., None] * s_k
        positions = np.arange(chunk.start, chunk.stop)
        scores = np.where(positions > first_position + np.arange(T)[:, None], -np.inf, scores)
        m_chunk = scores.max(-1)
        seen = m_chunk > -np.inf
        p = np.where(seen[..., None], np.exp(scores - np.where(seen, m_chunk, 0)[..., None]), 0)
        w = p * s_v
        unit = np.where(seen, w.max(-1), 1) / np.float32(MOST_WEIGHT)
        codes = np.rint(w * (1 / unit)[..., None]).astype(np.int64)
        o_chunk = np.einsum("hts,shd->htd", codes, values).astype(np.float32) * unit[..., None]
        m_new = np.maximum(m, m_chunk)
        kept, added = np.exp(m - m_new), np.exp(m_chunk - m_new)
        l = l * kept + p.sum(-1) * added
        o = o * kept[..., None] + o_chunk * added[..., None]
        m = m_new
    return (o / l[..., None]).transpose(1, 0, 2).astype(np.float32)


def _quantize_heads(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int64 [T, heads, d] and scales [T, heads]."""
    codes, scales = quantize_per_token(x.reshape(-1, x.shape[-1]), norm=False)
    return codes.astype(np.int64).reshape(x.shape), scales.reshape(x.shape[:2])
