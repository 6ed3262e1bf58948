import numpy as np

from thrifty.spec.quantize_per_token import quantize_per_token
from thrifty.spec.quantizers import absmean, binary_codes, round_bf16, ternary_codes


def warm_linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, share: float, kind: str = "ternary"
) -> np.ndarray:
    """y = (x + share (Q(x) - x)) (w + share (Q(w) - w))^T + b: a product that is quantised by degrees.

    Q(x) = q_x s_x of `quantize_per_token` without norm, Q(w) = q_w s_w of `absmean` and the codes of the kind. At share
    0 it is that of a dense layer, at 1 that of `ternary_matmul`, up to the rounding of floats. x: float32 [n, in];
    weight: float32 [out, in]. Returns float32 [n, out] (HF's "Fine-tuning LLMs to 1.58bit", 2024, section "Warm-up
    quantization").
    """
    x_codes, x_scales = quantize_per_token(x, norm=False)
    w_scale = absmean(weight, np, round_bf16)
    w_codes = ternary_codes(weight, w_scale, np) if kind == "ternary" else binary_codes(weight, np)
    x_warm = x + np.float32(share) * (x_codes * x_scales[:, None] - x)
    w_warm = weight + np.float32(share) * (w_codes * w_scale - weight)
    y = x_warm @ w_warm.T
    return y if bias is None else y + bias
