"""A packed layer evaluated: activations quantised and multiplied in two native calls."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from thrifty import native
from thrifty.errors import ThriftyError
from thrifty.ops.dispatch import use_native
from thrifty.ops.quantize_per_token import quantize_per_token
from thrifty.ops.ternary_matmul import FORMAT, ternary_matmul
from thrifty.spec.quantizers import EPS


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
    w_scale: float32 [1]; bias: [rows] or None. Returns float32 [..., rows]; no gradient. The bits are those of the two
    ops; on a CPU it costs a fraction of their calls, which is most of a product of one row.
    Raises ThriftyError where x does not have the columns of the weight, or the bytes are not those of its shape.
    """
    rows, cols = shape
    if x.shape[-1] != cols:
        raise ThriftyError(f"[packed_linear] x must have {cols} features; got {x.shape[-1]}")
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
