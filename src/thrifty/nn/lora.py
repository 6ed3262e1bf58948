"""Low-rank adapters beside packed layers, on peft, and their way back into two bits a weight."""

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty import ops
from thrifty.errors import ThriftyError
from thrifty.nn.packing import PackedBitLinear, stored_scale
from thrifty.nn.ternarize import ROUTERS

#: Lloyd's steps of `merged_codes`, most of which change next to nothing.
STEPS = 4


@dataclass(frozen=True)
class MergedLayer:
    """What merging an adapter into one layer lost."""

    #: Dotted name of the layer.
    name: str
    #: Share of the codes that changed; None for a dense layer, whose weights take the adapter as it is.
    flipped: float | None
    #: |W' - (W + D)| / |W + D|, in Frobenius norms, D the adapter's matrix.
    error: float
    #: The same over |D|: 0 where the adapter survived, 1 where nothing of it did.
    lost: float


class LoraPackedLinear(nn.Module, LoraLayer):
    """y = float32(q_x q_w^T) * (s_x * s_w) + b + (alpha / r) * x B A, q_x the codes of the very x that A reads.

    A packed layer with a low-rank adapter (LoRA, arXiv 2106.09685; on a quantised base, QLoRA, arXiv 2305.14314).
    x: [..., in] -> y: [..., out]; A: [r, in], B: [out, r], in float. Where the layer has norms of its own, x is what
    comes out of them, so that the adapter is a change D = (alpha / r) B A of the weight that the base multiplies by.
    The base stays packed; gradients reach A, B and x (`thrifty.ops.packed_linear`).

    `merge` replaces the base by `merged_codes` of both, which loses something, and `unmerge` brings it back.

    With `requantized` the layer multiplies by what merging gives already: y = float32(q_x q'^T) * (s_x * s') + b, (q',
    s') = merged_codes(q_w, s_w, D). Gradients go straight through to D, and so to A and B; merging then loses nothing.
    """

    #: Whether the adapter changes codes, as merging will, instead of adding to the product.
    requantized: bool = False

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: peft.LoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self._unmerged: list[tuple[Tensor, Tensor]] = []
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        base = self._base()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return base(x)
        x = base.normed(x)
        if not self.requantized:
            y = base.product(x)
            return y + self._added(x).to(y.dtype)
        y = base.product(x, weight=self._merged(self._active()))
        if not torch.is_grad_enabled():
            return y
        # Zero, with the gradients that the adapters have where they are added.
        added = self._added(x.detach())
        return y + (added - added.detach()).to(y.dtype)

    @torch.no_grad()
    def delta(self, names: Collection[str] | None = None) -> Tensor:
        """What the adapters (by default the active ones) add to the weight, float32 [out, in]."""
        base = self._base()
        total = torch.zeros(base.out_features, base.in_features, device=base.packed.device)
        for name in self._active() if names is None else names:
            a, b = self._matrices(name)
            total = torch.addmm(total, b.float(), a.float(), alpha=self.scaling[name])
        return total

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base by `merged_codes` with the adapters: peft's `merge_and_unload` comes here."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self._base()
        self._unmerged.append((base.packed, base.weight_scale))
        base.packed, base.weight_scale = self._merged(names)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Undo `merge`, to the bit."""
        base = self._base()
        while self._unmerged:
            base.packed, base.weight_scale = self._unmerged.pop()
        self.merged_adapters.clear()

    @torch.no_grad()
    def _merged(self, names: Collection[str]) -> tuple[Tensor, Tensor]:
        """Kernel layout and scale of the base with adapters."""
        base = self._base()
        codes, scale = merged_codes(base.codes(), base.weight_scale, self.delta(names), base.kind)
        return ops.pack_weight(codes), stored_scale(scale)

    def _added(self, x: Tensor) -> Tensor:
        """What the active adapters add to the product."""
        total: Tensor | None = None
        for name in self._active():
            a, b = self._matrices(name)
            seen = self.lora_dropout[name](x.to(a.dtype))
            one = F.linear(F.linear(seen, a), b) * self.scaling[name]
            total = one if total is None else total + one
        return x.new_zeros(()) if total is None else total

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # peft's own does not know the layer, and warns.
        return module.in_features, module.out_features  # pyright: ignore[reportReturnType]

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return a, b  # pyright: ignore[reportReturnType]

    def _base(self) -> PackedBitLinear:
        base: Any = self.get_base_layer()
        return base

    def __repr__(self) -> str:
        return f"lora.{super().__repr__()}"


def adapter_config(
    model: nn.Module, rank: int, alpha: float, targets: Collection[str] = (), dropout: float = 0.0
) -> peft.LoraConfig:
    """A peft configuration of adapters for the layers called `targets`, by default all linear ones between embedding
    and head.

    targets: last parts of dotted names ("q_proj"). Routers, which choose experts, have none unless named.
    Raises ThriftyError where a target is no linear layer of the model; the names that there are, are listed.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, PackedBitLinear | nn.Linear) and leaf != "lm_head":
            found.setdefault(leaf, []).append(name)
    unknown = sorted(set(targets) - found.keys())
    if unknown or not found:
        raise ThriftyError(
            f"[lora] targets must be linear layers of the model; got {', '.join(unknown) or 'a model without'}; "
            f"choose from {', '.join(sorted(found))}"
        )
    chosen = targets or [leaf for leaf in found if leaf not in ROUTERS]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        target_modules=sorted(name for leaf in chosen for name in found[leaf]),
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
    )
    return knowing_packed_layers(config)


def knowing_packed_layers(config: peft.PeftConfig) -> peft.LoraConfig:
    """The configuration, which from now on has `LoraPackedLinear` for packed layers. It is saved as peft saves it."""
    if not isinstance(config, peft.LoraConfig):
        raise ThriftyError(f"[lora] an adapter must be one of LoRA; got {config.peft_type}")
    config._register_custom_module({PackedBitLinear: LoraPackedLinear})
    return config


def load_adapter(model: Any, folder: str | Path, trainable: bool = False) -> peft.PeftModel:
    """The model with the adapter that lies in a folder, in peft's own files, or on the hub.

    It is `PeftModel.from_pretrained` with a configuration that knows packed layers.
    """
    config = knowing_packed_layers(peft.PeftConfig.from_pretrained(str(folder)))
    with warnings.catch_warnings():
        # What peft calls in transformers has newer names.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)


def requantize(model: nn.Module) -> None:
    """Let the adapters of packed layers change their codes, as merging will (`LoraPackedLinear.requantized`)."""
    for module in model.modules():
        if isinstance(module, LoraPackedLinear):
            module.requantized = True


def merge_adapter(model: peft.PeftModel) -> tuple[Any, list[MergedLayer]]:
    """The model without its adapter, which its layers have taken in, and what that lost, layer by layer.

    Packed layers are ternarised again (`merged_codes`); dense ones take the adapter as it is.
    """
    layers = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraPackedLinear):
            base = module._base()
            before, wanted, delta = base.codes(), _weight(base), module.delta()
            wanted += delta
            module.merge()
            flipped = (base.codes() != before).float().mean().item()
            apart = (_weight(base) - wanted).norm()
            lost = (apart / delta.norm()).item() if delta.any() else 0.0
            layers.append(MergedLayer(name, flipped, (apart / wanted.norm()).item(), lost))
        elif isinstance(module, LoraLayer):
            module.merge()  # pyright: ignore[reportCallIssue]
            layers.append(MergedLayer(name, None, 0.0, 0.0))
    return model.unload(), layers


def merged_codes(codes: Tensor, scale: Tensor, delta: Tensor, kind: ops.Kind = "ternary") -> tuple[Tensor, Tensor]:
    """Codes c' int8 [out, in] and scale s' [] nearest to W' = codes * scale + delta, by Lloyd's steps on |W' - s' c'|.

    c' = clip(round(W' / s'), -1, 1), for binary layers the signs; s' = mean |W'| where c' is not 0, rounded
    to bfloat16. That is absmean, but for the zeros: of a matrix that is ternary already, a share p of it not zero,
    absmean makes s * p, so that an adapter of zeros would shrink the layer. Here it gives back the codes and s.
    """
    if not delta.any():
        return codes, scale
    s = scale.float()
    wanted = codes * s + delta
    found = codes
    for _ in range(STEPS):
        found = torch.where(wanted > 0, 1, -1) if kind == "binary" else (wanted / s).round_().clamp_(-1, 1)
        kept = found != 0
        nearest = (wanted * found).sum() / kept.sum().clamp(min=1)
        if nearest <= 0 or nearest == s:
            break
        s = nearest
    return found.to(torch.int8), s.to(torch.bfloat16).float()


def _weight(layer: PackedBitLinear) -> Tensor:
    return layer.codes() * layer.weight_scale.float()
