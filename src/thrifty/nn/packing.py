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
    transformers' layout: `weight` uint8 [ceil(out / 4), in] (`thrifty.spec.ROW_BLOCK`), `weight_scale` [1], a
    multiplier, bfloat16 where that holds it and else float32, and `bias`. None of these is trained: gradients reach x
    alone (`thrifty.nn.lora` trains adapters beside it); `unpack` gives a BitLinear to train on.
    """

    #: Whether the latent weight was stored as [in, out].
    transposed: bool = False
    packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, kind: ops.Kind = "ternary", norm: Norm = None
    ) -> None:
        """codes: int8 [out, in] in {-1, 0, 1}; scale: one number, finite and above zero; bias: [out] or None."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.kind: ops.Kind = kind
        self.norm: Norm = norm
        self.rms_norm: nn.Module | None = None
        self.register_buffer("packed", ops.pack_weight(codes), persistent=False)
        self.register_buffer("weight_scale", stored_scale(scale).to(self.packed.device))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._dtype = torch.float32 if bias is None else bias.dtype

    def codes(self) -> Tensor:
        """Weight codes int8 [out, in]."""
        return ops.unpack_weight(self.packed, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The shape [out, in], dtype and device of the latent weight, for code that asks for these; its values, which
        nothing holds, are NaN."""
        return shape_only(self.out_features, self.in_features, self._dtype, self.packed.device)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rms_norm is None else self.rms_norm(x)
        # In float32 alone is the norm not rounded before the codes are taken.
        fused = self.norm == "rms" and x.dtype == torch.float32
        return self.product(x if fused else normalize(x, self.norm), fused)

    def normed(self, x: Tensor) -> Tensor:
        """What of x is quantised: x after the norms that the layer applies to its input."""
        return normalize(x if self.rms_norm is None else self.rms_norm(x), self.norm)

    def product(self, x: Tensor, norm: bool = False, weight: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The layer's answer to `normed(x)`; norm: to x itself, of which the RMS norm without gain is left to take.

        weight: other bytes and another scale to multiply by than those of the layer.
        """
        shape = self.out_features, self.in_features
        packed, scale = (self.packed, self.weight_scale) if weight is None else weight
        y = ops.packed_linear(x, packed, shape, scale.float(), self.bias, norm)
        device = x.device.type
        return y.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)

    def _apply(self, fn: Callable, recurse: bool = True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        # A cast of the model must not round the scale: it is data.
        self.weight_scale = scale.to(self.packed.device)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=scale.device)).dtype
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
        scale = state_dict.get(prefix + "weight_scale")
        if isinstance(scale, Tensor) and scale.shape == self.weight_scale.shape:
            try:
                self.weight_scale = stored_scale(scale).to(self.packed.device)
            except ThriftyError as error:
                errors.append(f"{prefix}weight_scale: {error}")
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
        self.rms_norm = linear.rms_norm
        shape = spec.ROW_BLOCK.packed_shape(self.out_features, self.in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8))
        # Of the two dtypes that a scale is stored in, the one that holds both.
        self.register_buffer("weight_scale", torch.empty(1, dtype=torch.float32))
        self.register_buffer("bias", None if linear.bias is None else torch.empty_like(linear.bias))

    def to_packed(self) -> PackedBitLinear:
        """The layer in the kernel layout. Raises ThriftyError where a byte stands for no code."""
        codes = from_stored(self.weight, self.out_features, self.in_features)
        packed = PackedBitLinear(codes, self.weight_scale, self.bias, kind=self.kind, norm=self.norm)
        packed.rms_norm = self.rms_norm
        return packed

    def extra_repr(self) -> str:
        return describe(self)


def pack(model: M, where: Where | None = None) -> M:
    """A copy of the model in which every BitLinear that `where(name, module)` accepts is a PackedBitLinear.

    The original keeps its latent weights; the copy never holds them. Packed logits equal the original's bit for bit.
    """

    def swap(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BitLinear):
            return None
        codes, scale = ops.quantize_weight(module.latent(), module.kind)
        packed = PackedBitLinear(codes, scale, module.bias, kind=module.kind, norm=module.norm)
        packed.transposed, packed._dtype = module.transposed, module.weight.dtype
        packed.rms_norm = copy.deepcopy(module.rms_norm)
        return packed

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


def shape_only(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor [rows, cols] of NaN that takes the memory of one."""
    return torch.full((1, 1), torch.nan, dtype=dtype, device=device).expand(rows, cols)


def stored_scale(scale: Tensor) -> Tensor:
    """A scale as [1], in bfloat16 where that holds it and else in float32. Raises ThriftyError for what is no scale."""
    wide = scale.detach().float().reshape(1)
    if not (wide.isfinite() & (wide > 0)).item():
        raise ThriftyError(f"[PackedBitLinear] a scale must be a finite number above 0; got {wide.item()}")
    narrow = wide.to(torch.bfloat16)
    return narrow if narrow.float() == wide else wide


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
    linear.transposed, linear.rms_norm = packed.transposed, copy.deepcopy(packed.rms_norm)
    codes, scale = packed.codes(), packed.weight_scale.float()
    share = codes.count_nonzero() / codes.numel()
    latent = codes.float() * (scale / share.clamp(min=1 / codes.numel()))
    linear.weight = nn.Parameter(latent.T.contiguous() if packed.transposed else latent)
    again, again_scale = ops.quantize_weight(linear.latent(), packed.kind)
    if not torch.equal(again, codes) or again_scale != scale:
        raise ThriftyError(
            f"[unpack] no latent weight has these codes and the scale {scale.item()}; got a checkpoint that was not "
            "made by absmean; run it packed"
        )
    if latent_bias is not None:
        linear.bias = nn.Parameter(latent_bias.clone())
    return linear


def _swap_leaves(model: M, swap: Callable[[nn.Module], nn.Module | None], where: Where | None) -> M:
    """A copy of the model with leaves replaced by what `swap` gives, if anything."""
    # deepcopy takes what stands in the memo for a copy, so a replaced leaf's weights are never copied.
    if not isinstance(model, nn.Module):
        raise ThriftyError(
            f"[pack] model must be a torch.nn.Module; got {type(model).__name__}; `ternarize` changes a model in place"
        )
    memo: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if where is None or where(name, module):
            replacement = swap(module)
            if replacement is not None:
                memo[id(module)] = replacement.train(module.training)
    return copy.deepcopy(model, memo)
