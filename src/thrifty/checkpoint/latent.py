"""Codes and scales of latent (master) weights as they are stored, without a float32 copy at every step."""

import numpy as np

from thrifty.checkpoint.safetensors import Tensor
from thrifty.spec import EPS, round_bf16

_HALF = np.float32(0.5)


def rounded_scale(weight: Tensor) -> np.float32:
    """`spec.absmean`: bf16(max(mean |w|, 1e-5)), as models of this package are trained."""
    return np.float32(round_bf16(np.maximum(_magnitudes(weight).mean(), np.float32(EPS))))


def transformers_factor(*weights: Tensor) -> np.float32:
    """What transformers' forward multiplies a weight by before it rounds: 1 / max(mean |w|, 1e-5), in float32.

    weights: the parts, of one size, of what is one weight there.
    """
    mean = np.mean([_magnitudes(weight).mean(dtype=np.float64) for weight in weights])
    return np.float32(1) / np.maximum(np.float32(mean), np.float32(EPS))


def scaled_codes(weight: Tensor, scale: np.float32) -> np.ndarray:
    """`spec.ternary_codes`: clip(round(w / s), -1, 1), int8.

    Halves go to even, which is 0, so that a code is not 0 where |w| / s in float32 is above 1/2: where |w| > s / 2, for
    the float32 next to s / 2 is already more than half a step of the quotient away.
    """
    return _signs_above(weight, _HALF * scale)


def multiplied_codes(weight: Tensor, factor: np.float32) -> np.ndarray:
    """clip(round(w * f), -1, 1), int8: not 0 above the largest |w| whose product with f is at most 1/2 in float32."""
    threshold = _HALF / factor
    while threshold * factor > _HALF:
        threshold = np.nextafter(threshold, np.float32(0))
    while (above := np.nextafter(threshold, np.float32(np.inf))) * factor <= _HALF:
        threshold = above
    return _signs_above(weight, threshold)


def _magnitudes(weight: Tensor) -> np.ndarray:
    """|w| as float32."""
    if weight.dtype == "BF16":
        bits = (weight.data & np.uint16(0x7FFF)).astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    values = weight.float32()
    return np.abs(values, out=values)


def _signs_above(weight: Tensor, threshold: np.float32) -> np.ndarray:
    """sign(w) where |w| > threshold, else 0: int8."""
    if weight.dtype == "BF16":
        # Magnitudes are ordered as their bits are, and none lies between a float32 and the bfloat16 below it.
        below = np.uint16(threshold.view(np.uint32) >> 16)
        codes = ((weight.data & np.uint16(0x7FFF)) > below).view(np.int8)
        negative = (weight.data > 0x7FFF).view(np.int8)
        negative &= codes
        codes -= negative
        codes -= negative
        return codes
    values = weight.float32()
    return (values > threshold).view(np.int8) - (values < -threshold).view(np.int8)
