import numpy as np


def mlgru(f: np.ndarray, c: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
    """h_t = f_t * h_{t-1} + (1 - f_t) * c_t, elementwise (MatMul-free LM, arXiv 2406.02528, section 3.3.1).

    f: forget gates, sigmoid(W_f x), float32 [T, d]; c: candidates, silu(W_c x), [T, d]; state: h_{-1} [d], zeros by
    default. Returns h, float32 [T, d]; h_{T-1} is the state to go on from. The layer's output is W_o (g * h),
    g = sigmoid(W_g x).
    """
    h = np.zeros_like(c[0]) if state is None else state
    out = np.empty_like(c)
    for t in range(len(f)):
        h = f[t] * h + (1 - f[t]) * c[t]
        out[t] = h
    return out
