"""The product of a packed layer: int8 activations by ternary (or +-1) weights in a kernel layout."""

import math

import torch
from torch import Tensor

from thrifty import native, spec
from thrifty.errors import ThriftyError
from thrifty.ops.bit_linear import integer_matmul
from thrifty.ops.dispatch import use_native
from thrifty.spec.formats import TILE_ROWS

#: The kernel layout held by packed modules.
FORMAT = spec.I2


def pack_weight(codes: Tensor) -> Tensor:
    """Bytes of weight codes in the kernel layout. codes: int8 [rows, cols] in {-1, 0, 1}. Returns uint8 [bytes].

    Raises ThriftyError where a code is none of these.
    """
    return torch.from_numpy(native.pack(FORMAT.name, codes.cpu().numpy())).flatten().to(codes.device)


def unpack_weight(packed: Tensor, rows: int, cols: int) -> Tensor:
    """Codes int8 [rows, cols] of bytes made by `pack_weight`, on any device."""
    n, lanes = FORMAT.codes_per_byte, TILE_ROWS
    padded_rows, padded_cols = FORMAT.padded(rows, cols)
    tiles = packed.view(padded_rows // lanes, padded_cols // (4 * n), lanes, 4)  # [tile, block, lane, j]
    digits = torch.stack([(tiles >> (2 * f)) & 3 for f in range(n)], dim=3)  # [tile, block, lane, f, j]
    codes = digits.permute(0, 2, 1, 3, 4).reshape(padded_rows, padded_cols)[:rows, :cols]
    return codes.to(torch.int8) - 1


def ternary_matmul(
    x_codes: Tensor, x_scales: Tensor, packed: Tensor, rows: int, w_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = float32(x_codes @ w_codes^T) * (x_scale * w_scale) + bias, the product in exact integers.

    x_codes: int8 [n, cols]; x_scales: float32 [n]; packed: uint8 [bytes], from `pack_weight`; w_scale: float32 [1];
    bias: [rows] or None. Returns float32 [n, rows], the bits of `thrifty.spec.ternary_matmul`. No gradient.
    Raises ThriftyError where the bytes do not fit the shape.
    """
    expected = math.prod(FORMAT.packed_shape(rows, x_codes.shape[-1]))  # plain integers, for torch.compile
    if packed.numel() != expected:
        raise ThriftyError(
            f"[ternary_matmul] {rows} x {x_codes.shape[-1]} weights in '{FORMAT.name}' take {expected} bytes; "
            f"got {packed.numel()}"
        )
    return _ternary_matmul(x_codes, x_scales, packed, rows, w_scale, bias)


@torch.library.custom_op("thrifty::ternary_matmul", mutates_args=())
def _ternary_matmul(
    x_codes: Tensor, x_scales: Tensor, packed: Tensor, rows: int, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    if use_native(x_codes):
        b = None if bias is None else bias.float().numpy()
        y = native.ternary_matmul(
            FORMAT.name, packed.numpy(), rows, x_codes.numpy(), x_scales.numpy(), w_scale.item(), b
        )
        return torch.from_numpy(y)
    codes = unpack_weight(packed, rows, x_codes.shape[1])
    y = integer_matmul(x_codes, codes) * (x_scales * w_scale)[:, None]
    return y if bias is None else y + bias.float()


@_ternary_matmul.register_fake
def _(x_codes: Tensor, x_scales: Tensor, packed: Tensor, rows: int, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x_scales.new_empty((x_codes.shape[0], rows), dtype=torch.float32)
