"""Loading and saving models: latent folders, packed folders, and nothing half-written."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from thrifty.checkpoint import SEED_NAMES, SEED_SSD_A, atomic_files
from thrifty.checkpoint.config import leaves_out_the_head
from thrifty.checkpoint.families import FAMILIES
from thrifty.checkpoint.folder import reciprocal
from thrifty.errors import ThriftyError
from thrifty.nn import SSD, BitLinear, is_packed, pack, unpack
from thrifty.nn.packing import StoredBitLinear

#: transformers' record of BitNet folders; with it goes quantization_mode, "offline" where packed, else "online".
#: scale_dtype is our own: a loader of latent weights rounds their scales as the training forward does.
QUANTIZATION = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "modules_to_not_convert": ["lm_head"],
    "scale_dtype": "bfloat16",
}
#: What a tensor that is absent or of another shape says of the folder's generation, by a part of its name.
GENERATIONS = {
    "self_attn.q_norm": "qk_norm=False",
    "self_attn.k_norm": "qk_norm=False",
    "self_attn.A": "dt_heads='attention'",
    "self_attn.dt_proj": "dt_heads='attention'",
    "mlp.router_gate": "router='product_key_heads'",
    "mlp.queries": "router='linear'",
    "mlp.keys": "router='linear'",
}
#: Fields that configurations take beside those they declare.
_OTHER_FIELDS = ("num_labels", "is_moe")
_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


logger = logging.get_logger(__name__)


class CheckpointedModel(PreTrainedModel):
    """`from_pretrained` and `save_pretrained` for models of BitLinear or PackedBitLinear layers."""

    #: Parameters that a folder may lack: those of a head on a pretrained model.
    new_keys: tuple[str, ...] = ()

    def finish(self, stored: bool) -> None:
        """The last step of a constructor; stored: make room for a packed checkpoint's tensors."""
        if stored:
            _replace(self, BitLinear, StoredBitLinear)
        self.post_init()

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | os.PathLike, *, unpack: bool = False, **kwargs: Any
    ) -> Self:
        """A model from a folder or a hub name: trainable from latent weights, packed from packed ones.

        unpack: turn packed layers into trainable ones (`thrifty.nn.unpack`). dtype: what to compute in; a packed folder
        is computed in float32 by default, as the runtime does, whatever its tensors are stored in. Other options are
        transformers'.
        Raises ThriftyError where the tensors are damaged or are not those of the config.
        """
        config, kwargs = cls._read_config(pretrained_model_name_or_path, kwargs)
        # transformers would hand every linear layer to its own classes; ours read this record themselves.
        packed = _storage(config.__dict__.pop("quantization_config", None), pretrained_model_name_or_path)
        stored = packed is not None
        with_info = kwargs.pop("output_loading_info", False)
        options = {"ignore_mismatched_sizes": True, **kwargs, "output_loading_info": True, "config": config}
        options["key_mapping"] = {**SEED_NAMES, **FAMILIES["1bitLLM"].names, **(kwargs.get("key_mapping") or {})}
        if stored:
            # transformers' own loader needs config.json to name the dtype of the stored tensors.
            options = {"dtype": torch.float32, **options, "stored": True}
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **options)
        except SafetensorError as error:
            raise ThriftyError(
                f"[load] {pretrained_model_name_or_path} must hold safetensors; {error}; get its tensors again"
            ) from error
        model, info = loaded
        _check(info, pretrained_model_name_or_path, kwargs.get("ignore_mismatched_sizes", False), cls.new_keys)
        _settle_seed_names(model)
        if packed is not None:
            _replace(model, StoredBitLinear, packed)
        if unpack:
            model = _unpack(model)
        return (model, info) if with_info else model  # pyright: ignore[reportReturnType]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # pyright: ignore
        """Write config, tensors and generation defaults; a file is replaced only when its successor is complete.

        A packed model gives a packed folder, a latent one a latent folder; `quantization_config` says which.
        """
        folder = Path(save_directory)
        with _described(self):
            if kwargs.get("push_to_hub"):
                super().save_pretrained(folder, **kwargs)
                return
            with atomic_files(folder) as staging:
                super().save_pretrained(staging, **kwargs)
                written = {file.name for file in staging.iterdir()}
            _remove_stale(folder, written)

    @classmethod
    def _read_config(cls, path: str | os.PathLike, kwargs: dict) -> tuple[PreTrainedConfig, dict]:
        kwargs = dict(kwargs)
        config = kwargs.pop("config", None)
        if isinstance(config, PreTrainedConfig):
            return copy.deepcopy(config), kwargs
        config_class: Any = cls.config_class
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        known = {*config_class.__dataclass_fields__, *_OTHER_FIELDS}
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        dtype = {"dtype": fields.pop("dtype")} if "dtype" in fields else {}
        return config_class.from_pretrained(config or path, **hub, **fields), {**kwargs, **dtype}


def round_dense_parameters(model: nn.Module) -> nn.Module:
    """Round every parameter that is not a BitLinear weight to the nearest bfloat16 value, in place.

    Embeddings, norms, heads and biases keep their dtype; after this a packed folder in bfloat16 loses nothing.
    Returns the model.
    """
    latent = {id(module.weight) for module in model.modules() if isinstance(module, BitLinear)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in latent:
                parameter.copy_(parameter.to(torch.bfloat16))
    return model


def save_packed(model: CheckpointedModel, folder: str | os.PathLike, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the packed form of a model: codes at 2 bits, scales, and the rest in dtype. The model is left as it is.

    Loaded again, it gives the same logits, bit for bit, where the dense parameters hold values of dtype
    (`round_dense_parameters`). The tokenizer is the caller's to copy. Raises ThriftyError for other models.
    """
    if not isinstance(model, CheckpointedModel):
        raise ThriftyError(
            f"[save_packed] model must be one of thrifty.models, which alone reads such a folder; got "
            f"{type(model).__name__}; keep torch.save(pack(model).state_dict(), file)"
        )
    packed: Any = pack(model)
    packed.to(dtype).save_pretrained(folder)


# `from_pretrained` has an option of this name.
_unpack = unpack


def _replace(model: nn.Module, kind: type, make: Any) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            model.set_submodule(name, make(module))


def _storage(record: Any, path: str | os.PathLike) -> Callable[[StoredBitLinear], nn.Module] | None:
    """What makes a packed layer of the stored one that a quantization_config announces; None for latent weights.

    Raises ThriftyError for a record that is not read here.
    """
    if record is None:
        return None
    record = record if isinstance(record, dict) else record.to_dict()
    if record.get("quant_method") != "bitnet":
        raise ThriftyError(f"[load] quant_method must be 'bitnet'; got '{record.get('quant_method')}' in {path}")
    linear_class, mode = record.get("linear_class", "bitlinear"), record.get("quantization_mode", "offline")
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise ThriftyError(
            f"[load] linear_class must be 'bitlinear' or 'autobitlinear'; got '{linear_class}' in {path}"
        )
    kept = record.get("modules_to_not_convert")
    if not leaves_out_the_head(kept):
        raise ThriftyError(
            f"[load] modules_to_not_convert must list the output head, and nothing else but embeddings; got {kept} in "
            f"{path}"
        )
    if linear_class == "bitlinear":
        return _divided
    if mode == "online":
        if record.get("scale_dtype") != "bfloat16":
            logger.warning_once(
                f"[load] scales of weights are rounded to bfloat16 here, and were not when {path} was trained: logits "
                "move by some 0.1 % until it is trained on; thrifty.runtime and `thrifty pack` keep them"
            )
        return None
    return _with_scaled_bias if record.get("bias_scaled") else StoredBitLinear.to_packed


def _divided(stored: StoredBitLinear) -> nn.Module:
    """The layer of transformers' BitLinear, whose scale divides."""
    with np.errstate(divide="ignore"):
        stored.weight_scale.fill_(float(reciprocal(np.float32(stored.weight_scale.item()))))
    return stored.to_packed()


def _with_scaled_bias(stored: StoredBitLinear) -> nn.Module:
    """The layer of transformers' AutoBitLinear, which scales its bias as it scales its product."""
    if stored.bias is not None:
        stored.bias = stored.bias * stored.weight_scale
    return stored.to_packed()


def _check(info: dict, path: str | os.PathLike, ignore_mismatched: bool, new: tuple[str, ...]) -> None:
    missing, mismatched = sorted(set(info["missing_keys"]) - set(new)), sorted(info["mismatched_keys"])
    rule = f"[load] the tensors of {path} must be those of its config"
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ThriftyError(f"{rule}; {missing[0]} is missing{more}{_way_out([*missing, *(m[0] for m in mismatched)])}")
    unexpected = [key for key in sorted(info["unexpected_keys"]) if _of_a_generation([key])]
    if unexpected:
        raise ThriftyError(
            f"{rule}; {unexpected[0]} has no place in the model; leave out the options that differ from its config"
        )
    if mismatched and not ignore_mismatched:
        name, found, expected = mismatched[0]
        raise ThriftyError(
            f"{rule}; {name} must have shape {tuple(expected)}; got {tuple(found)}{_way_out(m[0] for m in mismatched)}"
        )


def _way_out(names: Iterable[str]) -> str:
    names = list(names)
    # A layer that lacks all its tensors is of another kind.
    whole = any(name.endswith(("q_proj.weight", "down_embed.weight")) for name in names)
    options = [] if whole else _of_a_generation(names)
    return f"; for a checkpoint of another generation give {', '.join(options)}" if options else ""


def _of_a_generation(names: Iterable[str]) -> list[str]:
    """The options without which these tensors are found or missed."""
    found = {option: None for name in names for part, option in GENERATIONS.items() if f".{part}" in f".{name}"}
    return list(found)


def _settle_seed_names(model: Any) -> None:
    """After tensors with the seed's names: values that are stored otherwise, and names of our own from now on."""
    found = {pattern for used in model._weight_conversions or () for pattern in used.source_patterns}
    # Else transformers would save under the names it found.
    model._weight_conversions = None
    if SEED_SSD_A not in found:
        return
    for module in model.modules():
        if isinstance(module, SSD):
            with torch.no_grad():
                A = module.A_log
                if (A > 0).any():
                    logger.warning_once(
                        "[load] the seed's SSD grows its state without bound (A > 0); A is read as -|A|"
                    )
                A.copy_(A.abs().clamp(min=torch.finfo(torch.float32).tiny).log())


@contextmanager
def _described(model: CheckpointedModel) -> Iterator[None]:
    """The model's config with the quantization_config of what its layers are, while saving."""
    mode = None
    if is_packed(model):
        mode = "offline"
    elif any(isinstance(module, BitLinear) for module in model.modules()):
        mode = "online"
    if mode is not None:
        eps = model.config.linear_norm_eps
        norms = {} if eps is None else {"use_rms_norm": True, "rms_norm_eps": eps}
        model.config.quantization_config = {**QUANTIZATION, "quantization_mode": mode, **norms}
    try:
        yield
    finally:
        model.config.__dict__.pop("quantization_config", None)


def _remove_stale(folder: Path, written: set[str]) -> None:
    """Remove tensors of an earlier save in more or fewer files, which a loader could prefer to the new ones."""
    if any(name.endswith(".safetensors") for name in written):
        for pattern in ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"):
            for file in folder.glob(pattern):
                if file.name not in written:
                    file.unlink()
