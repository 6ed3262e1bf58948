"""A packed layer: activations quantised and multiplied in two native calls, and a gradient for what comes before it."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from thrifty import native
from thrifty.errors import ThriftyError
from thrifty.ops.dispatch import use_native
from thrifty.ops.quantize_per_token import quantize_per_token, rms_norm
from thrifty.ops.ternary_matmul import FORMAT, ternary_matmul, unpack_weight
from thrifty.spec.formats import TILE_ROWS
from thrifty.spec.quantizers import EPS

#: Codes that the backward holds as floats at a time.
_STRIP = 1 << 20


def packed_linear(
    x: Tensor,
    packed: Tensor,
    shape: tuple[int, int],
    w_scale: Tensor,
    bias: Tensor | None = None,
    norm: bool = False,
) -> Tensor:
    """y = ternary_matmul(*quantize_per_token(x), W) + bias, in float32, with x or, with norm, rms_norm(x).

    x: [..., cols] of any floating dtype; packed: uint8 [bytes], from `pack_weight`, of a weight of shape [rows, cols];
    w_scale: float32 [1]; bias: [rows] or None. Returns float32 [..., rows]. The bits are those of the two ops; on a CPU
    it costs a fraction of their calls, which is most of a product of one row.

    The gradient of x goes straight through its quantizer, dx = g (codes * s_w), as in `bit_linear`; codes become floats
    a strip of rows at a time and are not kept. Weight and bias have none.
    Raises ThriftyError where x does not have the columns of the weight, or the bytes are not those of its shape.
    """
    if x.shape[-1] != shape[1]:
        raise ThriftyError(f"[packed_linear] x must have {shape[1]} features; got {x.shape[-1]}")
    if torch.is_grad_enabled() and x.requires_grad:
        x = rms_norm(x.float()) if norm else x
        y: Tensor = _PackedLinear.apply(x, packed, shape, w_scale, bias)  # pyright: ignore
        return y
    return _evaluated(x, packed, shape, w_scale, bias, norm)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, shape, w_scale, bias):
        ctx.save_for_backward(packed, w_scale)
        ctx.cols, ctx.dtype = shape[1], x.dtype
        # What comes back was rounded to autocast's dtype, in which codes are exact, too.
        device = x.device.type
        ctx.product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        return _evaluated(x, packed, shape, w_scale, bias, False)

    @staticmethod
    def backward(ctx, grad):
        packed, w_scale = ctx.saved_tensors
        dx = _backward(grad.to(ctx.product), packed, ctx.cols, w_scale)
        return dx.to(ctx.dtype), None, None, None, None


@torch.library.custom_op("thrifty::packed_linear_backward", mutates_args=())
def _backward(grad: Tensor, packed: Tensor, cols: int, w_scale: Tensor) -> Tensor:
    """grad @ (codes * w_scale), float32 [..., cols]."""
    rows = grad.shape[-1]
    g = grad.reshape(-1, rows)
    dx = g.new_zeros((len(g), cols), dtype=torch.float32)
    # Whole tiles of rows lie together in the kernel layout.
    strip = max(1, _STRIP // cols // TILE_ROWS) * TILE_ROWS
    for first in range(0, rows, strip):
        count = min(strip, rows - first)
        codes = _unpack(packed[FORMAT.nbytes(first, cols) :][: FORMAT.nbytes(count, cols)], count, cols)
        dx += g[:, first : first + count] @ codes.to(g.dtype)
    return (dx * w_scale).view(*grad.shape[:-1], cols)


@_backward.register_fake
def _(grad: Tensor, packed: Tensor, cols: int, w_scale: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], cols), dtype=torch.float32)


def _unpack(packed: Tensor, rows: int, cols: int) -> Tensor:
    if use_native(packed):
        return torch.from_numpy(native.unpack(FORMAT.name, packed.numpy(), rows, cols))
    return unpack_weight(packed, rows, cols)


def _evaluated(
    x: Tensor, packed: Tensor, shape: tuple[int, int], w_scale: Tensor, bias: Tensor | None, norm: bool
) -> Tensor:
    rows, cols = shape
    if not _is_direct(x):
        codes, scales = quantize_per_token(x.reshape(-1, cols), norm=norm)
        return ternary_matmul(codes, scales, packed, rows, w_scale, bias).view(*x.shape[:-1], rows)
    x32 = x.float().contiguous()
    n = math.prod(x.shape[:-1])
    y, width = _result(x, packed, shape)
    if n == 0:
        return y
    codes = torch.empty(n * width, dtype=torch.int8)
    scales = torch.empty(n)
    native.quantize_into(x32.data_ptr(), None, EPS, norm, n, cols, codes.data_ptr(), width, scales.data_ptr())
    _multiply(codes, scales, packed, shape, w_scale, bias, y)
    return y


def packed_product(
    codes: Tensor, scales: Tensor, packed: Tensor, shape: tuple[int, int], w_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = ternary_matmul(codes, scales, W) + bias as `packed_linear` computes it, for codes that are there already.

    codes: int8 [n, cols]; scales: float32 [n]; the rest, and what is raised, as there. Returns float32 [n, rows].
    """
    rows, cols = shape
    if codes.shape[-1] != cols:
        raise ThriftyError(f"[packed_linear] x must have {cols} features; got {codes.shape[-1]}")
    if not _is_direct(codes):
        return ternary_matmul(codes, scales, packed, rows, w_scale, bias)
    y, width = _result(codes, packed, shape)
    if len(codes) > 0:
        padded = codes.contiguous() if width == cols else pad(codes, (0, width - cols))
        _multiply(padded, scales.contiguous(), packed, shape, w_scale, bias, y)
    return y


def _result(x: Tensor, packed: Tensor, shape: tuple[int, int]) -> tuple[Tensor, int]:
    """Where y goes, and the columns of the weight with padding."""
    rows, cols = shape
    width, size = _padded(rows, cols)
    if packed.numel() != size:
        raise ThriftyError(
            f"[packed_linear] {rows} x {cols} weights in '{FORMAT.name}' take {size} bytes; got {packed.numel()}"
        )
    return torch.empty(*x.shape[:-1], rows), width


def _multiply(
    codes: Tensor,
    scales: Tensor,
    packed: Tensor,
    shape: tuple[int, int],
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    b = None if bias is None else bias.float().contiguous()
    width = codes.numel() // len(scales)
    native.ternary_matmul_into(
        *(FORMAT.name, packed.data_ptr(), *shape, w_scale.data_ptr(), None if b is None else b.data_ptr()),
        *(codes.data_ptr(), width, scales.data_ptr(), len(scales), y.data_ptr()),
    )


def _is_direct(x: Tensor) -> bool:
    """Whether addresses of x may go to the native library, past torch, which may want to trace."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and use_native(x)


@cache
def _padded(rows: int, cols: int) -> tuple[int, int]:
    """Columns with padding, and bytes of the matrix."""
    return FORMAT.padded(rows, cols)[1], FORMAT.nbytes(rows, cols)
