"""Packed layers, and the walks that make them and unmake them."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from thrifty import native, ops, spec
from thrifty.errors import ThriftyError
from thrifty.nn.linear import BitLinear, Norm, describe, normalize

M = TypeVar("M", bound=nn.Module)
#: Says of a leaf (its dotted name, the module) whether a walk takes it.
Where = Callable[[str, nn.Module], bool]


class PackedBitLinear(nn.Module):
    """y = float32(q_x q_w^T) * (s_x * s_w) + b with stored codes q_w and scale s_w: a BitLinear at 2 bits a weight.

    The bits of y are those of the BitLinear it was packed from. It holds the kernel layout only; its state dict has
    transformers' layout: `weight` uint8 [ceil(out / 4), in] (`thrifty.spec.ROW_BLOCK`), `weight_scale` bfloat16 [1],
    a multiplier, and `bias`. It has no gradient: `unpack` gives a BitLinear to train on.
    """

    packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, kind: ops.Kind = "ternary", norm: Norm = None
    ) -> None:
        """codes: int8 [out, in] in {-1, 0, 1}; scale: one number that bfloat16 holds; bias: [out] or None."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.kind: ops.Kind = kind
        self.norm: Norm = norm
        stored = scale.detach().reshape(1).to(torch.bfloat16)
        if stored.float() != scale.float():
            raise ThriftyError(
                f"[PackedBitLinear] a scale must be a bfloat16 number; got {scale.item()}; round it as absmean does"
            )
        self.register_buffer("packed", ops.pack_weight(codes), persistent=False)
        self.register_buffer("weight_scale", stored)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def codes(self) -> Tensor:
        """Weight codes int8 [out, in]."""
        return ops.unpack_weight(self.packed, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        x_codes, x_scales = ops.quantize_per_token(normalize(x, self.norm).flatten(0, -2), norm=False)
        y = ops.ternary_matmul(x_codes, x_scales, self.packed, self.out_features, self.weight_scale.float(), self.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return y.to(dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable, recurse: bool = True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        # A cast of the model must not round the scale: it is data.
        self.weight_scale = scale.to(self.packed.device)
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = to_stored(self.codes())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        key = prefix + "weight"
        if key in state_dict:
            try:
                codes = from_stored(state_dict.pop(key), self.out_features, self.in_features)
                self.packed.copy_(ops.pack_weight(codes))
            except ThriftyError as error:
                errors.append(f"{key}: {error}")
        elif strict:
            missing.append(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{describe(self)}, bytes={self.packed.numel()}"


class StoredBitLinear(nn.Module):
    """The tensors of a packed layer as a checkpoint holds them, on their way to a `PackedBitLinear`; it cannot run."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: BitLinear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.kind: ops.Kind = linear.kind
        self.norm: Norm = linear.norm
        shape = spec.ROW_BLOCK.packed_shape(self.out_features, self.in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.empty(1, dtype=torch.bfloat16))
        self.register_buffer("bias", None if linear.bias is None else torch.empty_like(linear.bias))

    def to_packed(self) -> PackedBitLinear:
        """The layer in the kernel layout. Raises ThriftyError where a byte stands for no code."""
        codes = from_stored(self.weight, self.out_features, self.in_features)
        return PackedBitLinear(codes, self.weight_scale, self.bias, kind=self.kind, norm=self.norm)

    def extra_repr(self) -> str:
        return describe(self)


def pack(model: M, where: Where | None = None) -> M:
    """A copy of the model in which every BitLinear that `where(name, module)` accepts is a PackedBitLinear.

    The original keeps its latent weights; the copy never holds them. Packed logits equal the original's bit for bit.
    """

    def swap(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BitLinear):
            return None
        codes, scale = ops.quantize_weight(module.weight, module.kind)
        return PackedBitLinear(codes, scale, module.bias, kind=module.kind, norm=module.norm)

    return _swap_leaves(model, swap, where)


def unpack(model: M, where: Where | None = None) -> M:
    """A copy of the model in which every PackedBitLinear that `where(name, module)` accepts is a trainable BitLinear.

    Latent weights are float32: w = c * s / p, p the share of codes that are not zero. Then mean |w| = s, so the layer
    quantises to the same codes and the stored scale (w = c * s would give s * p); packing again gives the same bits.
    Raises ThriftyError where that cannot be (a scale below 1e-5, or codes that no latent weight has).
    """

    def swap(module: nn.Module) -> nn.Module | None:
        return _unpack_linear(module) if isinstance(module, PackedBitLinear) else None

    return _swap_leaves(model, swap, where)


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of the model is packed."""
    return any(isinstance(module, PackedBitLinear) for module in model.modules())


def to_stored(codes: Tensor) -> Tensor:
    """Weight codes in transformers' layout, uint8 [ceil(rows / 4), cols]."""
    return torch.from_numpy(native.pack(spec.ROW_BLOCK.name, codes.cpu().numpy())).to(codes.device)


def from_stored(packed: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `to_stored`. Raises ThriftyError where a byte stands for no code or the size does not fit."""
    return torch.from_numpy(native.unpack(spec.ROW_BLOCK.name, packed.cpu().numpy(), rows, cols)).to(packed.device)


def _unpack_linear(packed: PackedBitLinear) -> BitLinear:
    latent_bias = packed.bias
    linear = BitLinear(
        packed.in_features,
        packed.out_features,
        latent_bias is not None,
        weight=packed.kind,
        norm=packed.norm,
        device="meta",
    )
    codes, scale = packed.codes(), packed.weight_scale.float()
    share = codes.count_nonzero() / codes.numel()
    latent = codes.float() * (scale / share.clamp(min=1 / codes.numel()))
    again, again_scale = ops.quantize_weight(latent, packed.kind)
    if not torch.equal(again, codes) or again_scale != scale:
        raise ThriftyError(
            f"[unpack] no latent weight has these codes and the scale {scale.item()}; got a checkpoint that was not "
            "made by absmean; run it packed"
        )
    linear.weight = nn.Parameter(latent)
    if latent_bias is not None:
        linear.bias = nn.Parameter(latent_bias.clone())
    return linear


def _swap_leaves(model: M, swap: Callable[[nn.Module], nn.Module | None], where: Where | None) -> M:
    """A copy of the model with leaves replaced by what `swap` gives, if anything."""
    # deepcopy takes what stands in the memo for a copy, so a replaced leaf's weights are never copied.
    memo: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if where is None or where(name, module):
            replacement = swap(module)
            if replacement is not None:
                memo[id(module)] = replacement.train(module.training)
    return copy.deepcopy(model, memo)
