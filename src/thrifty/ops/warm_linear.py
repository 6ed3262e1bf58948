"""The product while quantisation warms up: between that of a dense layer and that of `bit_linear`."""

from torch import Tensor
from torch.nn import functional as F

from thrifty.errors import ThriftyError
from thrifty.ops.bit_linear import KINDS, Kind, quantize_weight
from thrifty.ops.dispatch import is_fused
from thrifty.ops.quantize_per_token import quantize_rows


def warm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, share: Tensor, kind: Kind = "ternary") -> Tensor:
    """y = (x + share (Q(x) - x)) (w + share (Q(w) - w))^T + b, Q(x) = q_x s_x, Q(w) = q_w s_w of `bit_linear`.

    x: [..., in]; weight: latent [out, in]; bias: [out] or None; share: one number from 0 (the dense product) to 1
    (`bit_linear`'s, up to the rounding of floats), a tensor [] so that a compiled step serves every share. Returns
    [..., out] in the dtype of x, or autocast's.

    The differences count as constants: dx = g w', dw = g^T x', with x' and w' the factors above (HF's "Fine-tuning LLMs
    to 1.58bit", 2024, "Warm-up quantization"). Kept for the backward: x' and w'.
    Raises ThriftyError for an unknown kind or a width that does not fit.
    """
    if kind not in KINDS:
        raise ThriftyError(f"[warm_linear] kind must be one of {', '.join(KINDS)}; got '{kind}'")
    if x.shape[-1] != weight.shape[-1]:
        raise ThriftyError(f"[warm_linear] x must have {weight.shape[-1]} features; got {x.shape[-1]}")
    x_codes, x_scales = quantize_rows(x.detach(), is_fused())
    w_codes, w_scale = quantize_weight(weight, kind)
    return F.linear(_toward(x, x_codes * x_scales[..., None], share), _toward(weight, w_codes * w_scale, share), bias)


def _toward(x: Tensor, quantized: Tensor, share: Tensor) -> Tensor:
    """x + share (quantized - x), with the gradient of x."""
    return x + (share * (quantized - x.detach())).to(x.dtype)
