"""The product of training: quantise activations and weights, multiply integers, pass gradients straight through."""

from typing import Literal

import torch
from torch import Tensor

from thrifty.errors import ThriftyError
from thrifty.ops.dispatch import is_fused
from thrifty.ops.quantize_per_token import quantize_rows
from thrifty.ops.sharded_weight import GatheredWeight
from thrifty.spec import quantizers

#: Weight quantizers by name.
KINDS = ("ternary", "binary")
Kind = Literal["ternary", "binary"]


def bit_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, kind: Kind = "ternary") -> Tensor:
    """y = float32(q_x q_w^T) * (s_x * s_w) + b with q, s of `quantize_per_token` and `quantize_weight`.

    x: [..., in]; weight: latent [out, in], any floating dtype; bias: [out] or None. Returns [..., out] in the dtype of
    x; before the cast to it the bits are those of `thrifty.spec.ternary_matmul`, so a packed layer answers the same.
    Under autocast the result has autocast's dtype, and in bfloat16 the integer sum, exact in the accumulator, is
    rounded once before the scales: the price of matrix units several times as fast.

    Gradients go straight through both quantizers (arXiv 2402.17764; no clipping mask):
    dx = g (q_w * s_w), dw = (g * s_x)^T q_x, db = sum g. Kept for the backward: int8 codes and scales.

    Raises ThriftyError for an unknown kind or a width that does not fit.
    """
    if kind not in KINDS:
        raise ThriftyError(f"[bit_linear] kind must be one of {', '.join(KINDS)}; got '{kind}'")
    if x.shape[-1] != weight.shape[-1]:
        raise ThriftyError(f"[bit_linear] x must have {weight.shape[-1]} features; got {x.shape[-1]}")
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    out_dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    sum_dtype = torch.bfloat16 if autocast and out_dtype == torch.bfloat16 else torch.float32
    y: Tensor = _BitLinear.apply(x, weight, bias, kind, sum_dtype, out_dtype, is_fused())  # pyright: ignore
    return y


def quantize_weight(weight: Tensor, kind: Kind = "ternary") -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scale float32 [] of a latent weight, by `thrifty.spec.quantizers`.

    s = bf16(max(mean |w|, 1e-5)); ternary c = clip(round(w / s), -1, 1); binary c = +1 where w > mean(w), else -1.
    """
    if isinstance(weight, GatheredWeight):
        return weight.quantized()
    w = weight.detach().float()
    scale = quantizers.absmean(w, torch, _round_bf16)
    codes = quantizers.ternary_codes(w, scale, torch) if kind == "ternary" else quantizers.binary_codes(w, torch)
    return codes.to(torch.int8), scale


def integer_matmul(x_codes: Tensor, w_codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x_codes @ w_codes^T, rounded to dtype. x_codes: int8 [n, in]; w_codes: int8 [out, in]. Returns [n, out].

    Codes are exact in bfloat16 and in float32, and their float32 sums are exact while below 2^24: up to 132 104
    features. So in float32 the result is exact.
    """
    return x_codes.to(dtype) @ w_codes.to(dtype).T


def _round_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


class _BitLinear(torch.autograd.Function):
    """A function and not an opaque op, so that a compiler fuses its element-wise parts with their neighbours."""

    @staticmethod
    def forward(ctx, x, weight, bias, kind, sum_dtype, out_dtype, fused):
        x_codes, x_scales = quantize_rows(x.reshape(-1, x.shape[-1]), fused)
        w_codes, w_scale = quantize_weight(weight, kind)
        ctx.save_for_backward(x_codes, x_scales, w_codes, w_scale)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        # Shaped before it is scaled, so that what is returned is no view, which FSDP's hooks would lose.
        sums = integer_matmul(x_codes, w_codes, sum_dtype).float().reshape(*x.shape[:-1], weight.shape[0])
        y = sums * (x_scales * w_scale).reshape(*x.shape[:-1], 1)
        if bias is not None:
            y = y + bias.float()
        return y.to(out_dtype)

    @staticmethod
    def backward(ctx, grad):
        x_codes, x_scales, w_codes, w_scale = ctx.saved_tensors
        x_dtype, w_dtype, bias_dtype = ctx.dtypes
        g = grad.reshape(-1, w_codes.shape[0])  # [n, out]
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[0]:
            # codes * s_w is exact in bfloat16, as s_w is a bfloat16 number.
            grad_x = (g @ (w_codes * w_scale).to(g.dtype)).to(x_dtype).reshape(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            scaled = (g.float() * x_scales[:, None]).to(g.dtype)
            grad_w = (scaled.T @ x_codes.to(g.dtype)).to(w_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = g.float().sum(0).to(bias_dtype)
        return grad_x, grad_w, grad_bias, None, None, None, None
