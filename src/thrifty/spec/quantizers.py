"""Weight and activation quantizers, as one text over a namespace `np` (numpy, torch or keras.ops)."""

from collections.abc import Callable
from typing import Any

import numpy

#: Largest activation code.
QMAX = 127
#: Floor of absmean and absmax, so that an all-zero tensor has a scale.
EPS = 1e-5
#: No bound above; Keras has no other name for it.
INFINITY = float("inf")


def round_bf16(x: Any) -> numpy.ndarray:
    """Nearest bfloat16 of float32 values, ties to even, as float32."""
    bits = numpy.asarray(x, numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & numpy.uint32(0xFFFF0000)).view(numpy.float32)


def absmean(w: Any, np: Any, round_bf16: Callable[[Any], Any]) -> Any:
    """Scale of a weight matrix: s = bf16(max(mean |w|, 1e-5)), a multiplier (b1.58, arXiv 2402.17764, section 2).

    Rounded to bfloat16 so that every container (safetensors, GGUF's fp16, Keras) holds it exactly. Computed once and
    stored: frameworks sum in different orders, so a scale is data, never recomputed from codes or by a loader.
    """
    return round_bf16(np.clip(np.mean(np.abs(w)), EPS, INFINITY))


def ternary_codes(w: Any, scale: Any, np: Any) -> Any:
    """Codes of b1.58: c = clip(round(w / s), -1, 1), ties to even, in the dtype of w (arXiv 2402.17764, eq. 1-3)."""
    return np.clip(np.round(w / scale), -1, 1)


def binary_codes(w: Any, np: Any) -> Any:
    """Codes of BitNet v1: c = +1 where w > mean(w), else -1, in the dtype of w (arXiv 2310.11453, eq. 1-3)."""
    return np.where(w > np.mean(w), np.ones_like(w), -np.ones_like(w))


def absmax_codes(x: Any, np: Any) -> tuple[Any, Any]:
    """Codes and scales per token: a = max(max |x|, 1e-5), c = round(x * (127 / a)), s = a / 127.

    x: float32 [..., d]. Returns codes in the dtype of x and scales [..., 1] (arXiv 2402.17764, section 2, with the
    symmetric range).
    """
    a = np.clip(np.amax(np.abs(x), axis=-1, keepdims=True), EPS, INFINITY)
    qmax = QMAX * np.ones_like(a)  # torch divides by or into a Python number through a reciprocal, rounding twice
    return np.round(x * (qmax / a)), a / qmax
