import numpy as np

from thrifty.spec.quantizers import EPS, absmax_codes

#: Partial sums of RMSNorm's sum of squares: element j goes to lane j mod 16.
LANES = 16


def rms_norm(x: np.ndarray, gain: np.ndarray | None = None, eps: float = EPS) -> np.ndarray:
    """y = (x * r) * gain, r = 1 / sqrt(mean(x^2) + eps), every operation rounded to float32 (arXiv 1910.07467).

    x: float32 [..., d]; gain: float32 [d] or None for ones. The order of the sum is part of the definition, since its
    last bit can move a code: 16 partial sums (element j in lane j mod 16), folded in halves; no fused multiply-add.
    """
    x = np.asarray(x, np.float32)
    d = x.shape[-1]
    squares = np.zeros((*x.shape[:-1], -(-d // LANES) * LANES), np.float32)
    squares[..., :d] = x * x
    lanes = np.zeros((*x.shape[:-1], LANES), np.float32)
    for start in range(0, d, LANES):
        lanes = lanes + squares[..., start : start + LANES]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    r = np.float32(1) / np.sqrt(lanes / np.float32(d) + np.float32(eps))
    return x * r if gain is None else (x * r) * np.asarray(gain, np.float32)


def quantize_per_token(
    x: np.ndarray, gain: np.ndarray | None = None, eps: float = EPS, norm: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """codes = round(y * (127 / a)), scale = a / 127, a = max(max |y|, 1e-5), y = rms_norm(x, gain) or x itself.

    x: float32 [n, d]. Returns int8 [n, d] and float32 [n]; y is about codes * scale (arXiv 2402.17764, section 2).
    """
    y = rms_norm(x, gain, eps) if norm else np.asarray(x, np.float32)
    codes, scales = absmax_codes(y, np)
    return codes.astype(np.int8), scales[..., 0].astype(np.float32)
