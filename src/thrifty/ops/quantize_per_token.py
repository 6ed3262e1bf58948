"""RMSNorm in the spec's order of arithmetic, and absmax int8 codes per token."""

import torch
from torch import Tensor

from thrifty import native
from thrifty.errors import ThriftyError
from thrifty.ops.dispatch import as_array, is_fused, use_native
from thrifty.spec.quantize_per_token import LANES
from thrifty.spec.quantizers import EPS, absmax_codes


def rms_norm(x: Tensor, gain: Tensor | None = None, eps: float = EPS) -> Tensor:
    """y = (x * r) * gain, r = 1 / sqrt(mean(x^2) + eps), in float32, in the dtype of x (arXiv 1910.07467).

    x: [..., d]; gain: [d] or None for ones. The bits before the cast are those of `thrifty.spec.rms_norm`.
    Differentiable in x and gain. Raises ThriftyError where gain does not have d entries.
    """
    if gain is not None and gain.shape != x.shape[-1:]:
        raise ThriftyError(
            f"[rms_norm] gain must have the {x.shape[-1]} entries of a row; got shape {tuple(gain.shape)}"
        )
    if is_fused():
        return _rms_norm_text(x.float(), gain, eps).to(x.dtype)
    return _rms_norm(x, gain, eps)


def quantize_per_token(
    x: Tensor, gain: Tensor | None = None, eps: float = EPS, norm: bool = True
) -> tuple[Tensor, Tensor]:
    """codes = round(y * (127 / a)), scale = a / 127, a = max(max |y|, 1e-5), y = rms_norm(x, gain) or x itself.

    x: [..., d]. Returns int8 [..., d] and float32 [...], the bits of `thrifty.spec.quantize_per_token` (arXiv
    2402.17764, section 2). Codes have no gradient: the straight-through estimator belongs to the product,
    `thrifty.ops.bit_linear`.
    """
    if gain is not None and not norm:
        raise ThriftyError("[quantize_per_token] a gain belongs to the norm; got norm=False; drop the gain")
    return _quantize_per_token(x.detach(), None if gain is None else gain.detach(), eps, norm)


@torch.library.custom_op("thrifty::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    rows = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
    if use_native(rows):
        y = torch.from_numpy(native.rms_norm(rows.numpy(), None if gain is None else as_array(gain.float()), eps))
    else:
        y = _rms_norm_text(rows, gain, eps)
    return y.to(x.dtype).reshape(x.shape)


@_rms_norm.register_fake
def _(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rms_norm_setup(ctx, inputs, output) -> None:
    x, gain, ctx.eps = inputs
    ctx.save_for_backward(x, gain)


def _rms_norm_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, gain = ctx.saved_tensors
    g, x32 = grad.float(), x.float()
    r = torch.rsqrt(x32.square().mean(-1, keepdim=True) + ctx.eps)
    unit = x32 * r
    grad_gain = None if gain is None else (g * unit).flatten(0, -2).sum(0).to(gain.dtype)
    g = g if gain is None else g * gain.float()
    grad_x = r * (g - unit * (g * unit).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), grad_gain, None


_rms_norm.register_autograd(_rms_norm_backward, setup_context=_rms_norm_setup)


@torch.library.custom_op("thrifty::quantize_per_token", mutates_args=())
def _quantize_per_token(x: Tensor, gain: Tensor | None, eps: float, norm: bool) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    if use_native(rows):
        codes, scales = native.quantize_per_token(
            rows.numpy(), None if gain is None else as_array(gain.float()), eps, norm
        )
        return torch.from_numpy(codes).view(x.shape), torch.from_numpy(scales).view(x.shape[:-1])
    return _quantize_text(_rms_norm_text(x.float(), gain, eps) if norm else x.float())


@_quantize_per_token.register_fake
def _(x: Tensor, gain: Tensor | None, eps: float, norm: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def quantize_rows(x: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """`quantize_per_token` without norm, as an op of its own or (fused) as text for a compiler."""
    return _quantize_text(x.float()) if fused else _quantize_per_token(x, None, EPS, False)


def _quantize_text(y: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = absmax_codes(y, torch)
    return codes.to(torch.int8), scales[..., 0]


def _rms_norm_text(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    d = x.shape[-1]
    squares = torch.nn.functional.pad(x * x, (0, -d % LANES)).unflatten(-1, (-1, LANES))  # [..., d / 16, 16]
    lanes = x.new_zeros(*x.shape[:-1], LANES)
    for chunk in squares.unbind(-2):
        lanes = lanes + chunk
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, dim=-1)
        lanes = low + high
    # torch divides by or into a Python number through a reciprocal on some devices, and its float32 square root (MKL's)
    # is off by an ulp now and then; a double one, rounded, is not.
    root = torch.sqrt((lanes / torch.full_like(lanes, d) + eps).double()).float()
    y = x * (torch.ones_like(root) / root)
    return y if gain is None else y * gain.float()
