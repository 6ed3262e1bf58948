import numpy as np


def ssd(
    x: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    state: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t (Mamba-2, arXiv 2405.21060, section 6).

    x: float32 [T, heads, p]; dt > 0: [T, heads]; A < 0: [heads]; B, C: [T, groups, n], head h reads group
    h // (heads / groups); D: [heads]; state: [heads, p, n], zeros by default. Returns y [T, heads, p] and the state
    after it.
    """
    T, heads, p = x.shape
    B, C = (np.repeat(t, heads // t.shape[1], axis=1) for t in (B, C))
    h = np.zeros((heads, p, B.shape[-1]), x.dtype) if state is None else state
    y = np.empty_like(x)
    for t in range(T):
        h = np.exp(A * dt[t])[:, None, None] * h + (dt[t][:, None] * x[t])[..., None] * B[t][:, None, :]
        y[t] = np.einsum("hpn,hn->hp", h, C[t])
    return (y if D is None else y + D[:, None] * x), h
