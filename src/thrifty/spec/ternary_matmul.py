import numpy as np


def ternary_matmul(
    x_codes: np.ndarray,
    x_scales: np.ndarray,
    w_codes: np.ndarray,
    w_scale: np.ndarray | np.floating | float,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """y = float32(x_codes @ w_codes.T) * (x_scale * w_scale) + bias, the product in exact integers.

    x_codes: int8 [n, cols]; x_scales: float32 [n]; w_codes: int8 [rows, cols], ternary or binary (+-1);
    w_scale: float32, a scalar or one per row; bias: float32 [rows] or None. Returns float32 [n, rows]
    (arXiv 2402.17764, section 2). Exact in int32 for any cols below 2^24.
    """
    acc = x_codes.astype(np.int32) @ w_codes.astype(np.int32).T  # [n, rows]
    scale = np.asarray(x_scales, np.float32)[:, None] * np.asarray(w_scale, np.float32).reshape(1, -1)
    y = acc.astype(np.float32) * scale
    return y if bias is None else y + np.asarray(bias, np.float32)
