import numpy as np


def penalize_repetition(logits: np.ndarray, tokens: np.ndarray, penalty: float) -> np.ndarray:
    """l / p where l > 0, l * p otherwise, for every token already seen (CTRL, arXiv 1909.05858, section 4.1)."""
    seen = np.unique(tokens)
    out = logits.copy()
    out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    return out


def sample(
    logits: np.ndarray,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int:
    """Token drawn from softmax(logits / temperature) over the kept tokens; temperature 0 takes the first arg-max.

    logits: float32 [vocabulary]. top_k > 0 keeps the k largest (arXiv 1805.04833); then top_p < 1 keeps the smallest
    set of most likely tokens whose probability reaches top_p (nucleus sampling, arXiv 1904.09751). Equal logits keep
    the order of token ids.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    kept_logits = logits[order].astype(np.float64)
    # The largest goes first: divided by a temperature near zero it would be infinite, and its exponential no number.
    with np.errstate(over="ignore"):
        p = np.exp((kept_logits - kept_logits[0]) / temperature)
    p /= p.sum()
    if top_p < 1:
        kept = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    return int(order[min(int(np.searchsorted(np.cumsum(p), rng.random(), side="right")), len(order) - 1)])
