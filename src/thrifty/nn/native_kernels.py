"""transformers' own BitNet layers, run by the native kernels."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thrifty import native, ops
from thrifty.errors import ThriftyError
from thrifty.nn.packing import from_stored, shape_only, to_stored
from thrifty.nn.replacements import Layer, Replacements, nbytes


def use_native_kernels(model: nn.Module) -> Replacements:
    """Every `BitLinear` and `AutoBitLinear` of transformers becomes a `NativeBitLinear`, in place, of the same outputs.

    transformers unpacks a BitNet checkpoint at every forward (`linear_class` "bitlinear"), or once into floats
    ("autobitlinear"). The native layers hold two bits a weight and multiply integers, on the CPU. Each weight is freed
    when its layer is replaced. `save_pretrained` writes what plain transformers loads, in the convention of the config.

    Layers of `quantization_mode` "online" are frozen as they are: they cannot be trained any more, and the config says
    "offline" from then on. Integers are those of transformers; outputs differ from its only as its floats round.
    Returns a record, whose text is a table.
    Raises ThriftyError where no such layer is found, where one is not on the CPU or holds what is no code, and where
    there is no native library; the layers before a damaged one are replaced then.
    """
    if not isinstance(model, nn.Module):
        raise ThriftyError(f"[use_native_kernels] model must be a torch.nn.Module; got {type(model).__name__}")
    if not native.available():
        raise ThriftyError("[use_native_kernels] there is no native library; install with a C++ compiler")
    home: Any = sys.modules.get("transformers.integrations.bitnet")
    names = [] if home is None else [n for n, m in model.named_modules() if _is_theirs(home, m)]
    if not names or "" in names:
        kinds = sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__})
        raise ThriftyError(
            "[use_native_kernels] a model must have BitLinear or AutoBitLinear layers of transformers; got "
            f"{'such a layer itself' if names else ', '.join(kinds) or 'no linear layer'}; "
            f"{'put it into a model' if names else '`thrifty.nn.ternarize` and `pack` are for other models'}"
        )
    for name in names:
        device = model.get_submodule(name).weight.device
        if device.type != "cpu":  # pyright: ignore
            raise ThriftyError(f"[use_native_kernels] '{name}' must be on the CPU; got {device}; move the model there")
    before = sum(nbytes(t) for t in _tensors(model))
    replaced = [_swap(model, home, name) for name in names]
    _save_as_packed(home, model)
    after = sum(nbytes(t) for t in _tensors(model))
    rest = after - sum(layer.bytes_packed for layer in replaced)
    return Replacements("native kernels", tuple(replaced), (), rest, before, after)


#: What others have hung on a layer, and stays on the one that takes its place.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


class NativeBitLinear(nn.Module):
    """y = float32(q_x q_w^T) * (s_x * s_w) + b: transformers' `BitLinear`, or its `AutoBitLinear`, at 2 bits a weight.

    x: [..., in] -> y: [..., out] in the dtype of x. Its state dict is that of the layer it replaces: `weight`,
    `weight_scale`, `bias`, `rms_norm.weight`; weight uint8 [out / 4, in] (`thrifty.spec.ROW_BLOCK`), or, where four
    does not divide out, codes as floats. divides: the convention of `BitLinear`, s_w = 1 / weight_scale; else that of
    `AutoBitLinear`, s_w = weight_scale, by which the stored bias is multiplied too. The weight has no gradient.
    """

    packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, divides: bool, rms_norm: nn.Module | None = None
    ) -> None:
        """codes: int8 [out, in]; scale: [1] and bias [out] as transformers stores them."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.divides = divides
        self.rms_norm = rms_norm
        self.register_buffer("packed", ops.pack_weight(codes), persistent=False)
        if scale.numel() != 1:
            raise ThriftyError(f"[use_native_kernels] weight_scale must be one number; got shape {tuple(scale.shape)}")
        self.register_buffer("weight_scale", scale.detach().reshape(1).clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._settle()

    def codes(self) -> Tensor:
        """Weight codes int8 [out, in]."""
        return ops.unpack_weight(self.packed, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The shape [out, in], dtype and device of the weight, for code that asks for these; its values are NaN."""
        return shape_only(self.out_features, self.in_features, self.weight_scale.dtype, self.packed.device)

    def forward(self, x: Tensor) -> Tensor:
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        if self.divides and x.dtype != torch.float32:
            return self._rounded(x)
        shape = self.out_features, self.in_features
        y = ops.packed_linear(x, self.packed, shape, self._multiplier, self._bias)
        return y.to(x.dtype)

    def _rounded(self, x: Tensor) -> Tensor:
        """As `BitLinear` computes in less than float32: the scale of a token is rounded before the codes are taken."""
        rows = x.reshape(-1, x.shape[-1])
        scale = (127 / rows.abs().amax(-1, keepdim=True).float().clamp_(min=1e-5)).to(x.dtype).float()
        codes = rows.float().mul_(scale).round_().to(torch.int8)
        shape = self.out_features, self.in_features
        y = ops.packed_product(codes, scale.reciprocal_()[:, 0], self.packed, shape, self._multiplier, self._bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _settle(self) -> None:
        """What the kernel takes, of what is stored."""
        scale = self.weight_scale.float()
        if not (scale.isfinite() & (scale != 0)).item():
            raise ThriftyError(f"[use_native_kernels] weight_scale must be finite and not 0; got {scale.item()}")
        self._multiplier = 1 / scale if self.divides else scale
        bias = None if self.bias is None else self.bias.float()
        self._bias = bias if bias is None or self.divides else bias * scale

    def _apply(self, fn: Callable, recurse: bool = True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        # A cast of the model must not round the scale: it is data.
        self.weight_scale = scale.to(self.packed.device)
        self._settle()
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes = self.codes()
        # transformers knows packed weights by a quarter of the rows.
        whole = self.out_features % 4 == 0
        destination[prefix + "weight"] = to_stored(codes) if whole else codes.to(self.weight_scale.dtype)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        key = prefix + "weight"
        if key in state_dict:
            try:
                self.packed.copy_(ops.pack_weight(_codes_of(state_dict.pop(key), self.out_features, self.in_features)))
            except ThriftyError as error:
                errors.append(f"{key}: {error}")
        elif strict:
            missing.append(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        try:
            self._settle()
        except ThriftyError as error:
            errors.append(f"{prefix}weight_scale: {error}")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"divides={self.divides}, bytes={self.packed.numel()}"
        )


def _is_theirs(home: Any, module: nn.Module) -> bool:
    return isinstance(module, home.BitLinear | home.AutoBitLinear)


def _swap(model: nn.Module, home: Any, name: str) -> Layer:
    """Replace one layer wherever the model has it."""
    theirs: Any = model.get_submodule(name)
    try:
        ours = _native(home, theirs)
    except ThriftyError as error:
        raise ThriftyError(f"{error}, in the layer '{name}'") from error
    before = sum(map(nbytes, _tensors(theirs)))
    if isinstance(theirs, home.AutoBitLinear) and theirs.online_quant:
        _say_offline(model)
    places = [(owner, leaf) for owner in model.modules() for leaf, child in owner._modules.items() if child is theirs]
    for hooks in _HOOKS:
        getattr(ours, hooks).update(getattr(theirs, hooks))
    for owner, leaf in places:
        setattr(owner, leaf, ours)
    note = "divides by its scale" if ours.divides else "multiplies by its scale"
    return Layer(name, (ours.out_features, ours.in_features), before, sum(map(nbytes, _tensors(ours))), note)


def _native(home: Any, theirs: Any) -> NativeBitLinear:
    rows, cols, norm = theirs.out_features, theirs.in_features, theirs.rms_norm
    if isinstance(theirs, home.BitLinear):
        codes, scale, bias, divides = _codes_of(theirs.weight, rows, cols), theirs.weight_scale, theirs.bias, True
    elif not theirs.online_quant:
        codes, scale, bias, divides = _codes_of(theirs.weight, rows, cols), theirs.weight_scale, theirs.bias, False
    else:
        # As `WeightQuant` has it, which rounds to the dtype of the weight; "offline" multiplies the bias too.
        weight = theirs.weight.detach()
        inverse = 1.0 / weight.float().abs().mean().clamp(min=1e-5)
        codes, divides = (weight.float() * inverse).round().clamp(-1, 1).to(torch.int8), False
        scale = (1 / inverse).to(weight.dtype)
        bias = None if theirs.bias is None else (theirs.bias.float() / scale.float()).to(theirs.bias.dtype)
    return NativeBitLinear(codes, scale, bias, divides, norm).train(theirs.training)


def _codes_of(weight: Tensor, rows: int, cols: int) -> Tensor:
    """Codes int8 [rows, cols] of a weight as transformers holds it: packed bytes, or -1, 0 and 1 as floats."""
    weight = weight.detach()
    if weight.dtype == torch.uint8:
        return from_stored(weight, rows, cols)
    codes = weight.to(torch.int8)
    if weight.shape != (rows, cols) or not torch.equal(codes.to(weight.dtype), weight) or codes.abs().max() > 1:
        raise ThriftyError(
            f"[use_native_kernels] a weight must have -1, 0 and 1 in [{rows}, {cols}]; got other values, or shape "
            f"{tuple(weight.shape)}; is the folder one of master weights (quantization_mode 'online')?"
        )
    return codes


def _say_offline(model: Any) -> None:
    for holder in (getattr(model, "config", None), getattr(model, "hf_quantizer", None)):
        record = getattr(holder, "quantization_config", None)
        if isinstance(record, dict):
            record["quantization_mode"] = "offline"
        elif record is not None:
            record.quantization_mode = "offline"


def _save_as_packed(home: Any, model: Any) -> None:
    """Forget how transformers unpacked the weights: the state dict has them packed, and its own way back is missing."""
    unpacking = getattr(home, "BitNetDeserialize", ())
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            each for each in conversions if not any(isinstance(op, unpacking) for op in getattr(each, "operations", ()))
        ]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
