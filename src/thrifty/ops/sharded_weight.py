"""A ternary weight spread over processes: each keeps its rows in floats, and only codes of two bits travel."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
#: Ops of FSDP2 whose result is the same weight, or a piece of it.
_KEEPS = {
    aten.alias.default,
    aten.as_strided.default,
    aten.clone.default,
    aten.detach.default,
    aten.narrow.default,
    aten.new_zeros.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.view.default,
}


class _Wrapper(torch.Tensor):
    """A tensor that is computed with as its `data`."""

    data_: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]


class ShardedWeight(_Wrapper):
    """Rows of a latent ternary weight, computed with as any tensor, of which FSDP2 gathers `codes` instead of floats.

    `refresh_codes` sets the codes after each change of the weights.
    """

    #: Codes of these rows, four a byte [rows, ceil(in / 4)], and the scale of the whole weight [].
    codes: Tensor | None = None
    scale: Tensor | None = None

    @staticmethod
    def __new__(cls, data: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, data.shape, strides=data.stride(), dtype=data.dtype, device=data.device
        )

    def __init__(self, data: Tensor) -> None:
        self.data_ = data

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"ShardedWeight({self.data_})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain_args, plain_kwargs = tree_map_only(ShardedWeight, lambda weight: weight.data_, (args, kwargs or {}))
        out = func(*plain_args, **plain_kwargs)
        if isinstance(args[0], cls):
            if func._schema.name.endswith("_"):
                return args[0]
            if func in _KEEPS:
                return tree_map_only(Tensor, cls, out)
        return out

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What FSDP2 gathers, and what it hands on to `fsdp_post_all_gather`."""
        if self.codes is None or self.scale is None:
            raise RuntimeError("refresh_codes must follow a change of the weights")
        return (self.codes,), self.scale

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], scale: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The weight of these codes; `out` is the one that an earlier call made, over the same bytes."""
        (codes,) = outputs
        if isinstance(out, GatheredWeight):
            out.scale = scale
            return None
        return GatheredWeight(codes, scale, self.shape[1], dtype), (codes,)


class GatheredWeight(_Wrapper):
    """A whole ternary weight of which there are only codes, four a byte [out, ceil(in / 4)], and the scale."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, (codes.shape[0], in_features), dtype=dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> None:
        self.data_, self.scale = codes, scale

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"GatheredWeight({tuple(self.shape)}, scale={self.scale})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func not in (aten.alias.default, aten.as_strided.default, aten.detach.default):
            raise NotImplementedError(f"[sharding] only codes of this weight are here, and {func} needs floats")
        weight = args[0]
        return cls(weight.data_, weight.scale, weight.shape[1], weight.dtype)

    def quantized(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [out, in] and scale []."""
        return unpack_codes(self.data_, self.shape[1]), self.scale


def pack_codes(codes: Tensor) -> Tensor:
    """Bytes [rows, ceil(n / 4)] of codes -1, 0, 1 [rows, n]: c + 1 in two bits, the first in the lowest."""
    fields = torch.nn.functional.pad(codes.to(torch.int8) + 1, (0, -codes.shape[1] % 4)).view(torch.uint8)
    fields = fields.reshape(len(codes), -1, 4)
    return fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6


def unpack_codes(packed: Tensor, count: int) -> Tensor:
    """Codes int8 [rows, count] of the bytes of `pack_codes`."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    fields = (packed[..., None] >> shifts) & 3
    return (fields.flatten(1)[:, :count].to(torch.int8)) - 1
