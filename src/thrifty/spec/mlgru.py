import numpy as np


def mlgru(
    f: np.ndarray, c: np.ndarray, state: np.ndarray | None = None, bounds: np.ndarray | None = None
) -> np.ndarray:
    """h_t = f_t * h_{t-1} + (1 - f_t) * c_t, elementwise (MatMul-free LM, arXiv 2406.02528, section 3.3.1).

    f: forget gates, sigmoid(W_f x), float32 [T, d]; c: candidates, silu(W_c x), [T, d]; state: h_{-1} [d], zeros by
    default; bounds: b in [0, 1), [d], below which no gate goes: b + (1 - b) * f stands for f. Returns h, float32
    [T, d]; h_{T-1} is the state to go on from. The layer's output is W_o (g * h), g = sigmoid(W_g x); in HGRN, whose
    gates have bounds, W_o (rms_norm(W_g x) * silu(h)).
    """
    if bounds is not None:
        f = bounds + (1 - bounds) * f
    h = np.zeros_like(c[0]) if state is None else state
    out = np.empty_like(c)
    for t in range(len(f)):
        h = f[t] * h + (1 - f[t]) * c[t]
        out[t] = h
    return out


def gate_bounds(values: np.ndarray) -> np.ndarray:
    """b_l = sum_{k=1..l} softmax_layers(values)_k: what no gate of layer l goes below (HGRN, arXiv 2311.04823, 3.3).

    values: learned, float32 [layers, d]. Returns float32 [layers, d], increasing from 0 in the first layer.
    """
    shares = np.exp(values - values.max(0))
    shares /= shares.sum(0)
    return np.cumsum(shares, 0) - shares[0]
