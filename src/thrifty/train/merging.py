"""Adapters taken into the layers they were trained beside, and what that loses."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from thrifty.checkpoint import atomic_folder
from thrifty.checkpoint.config import read_json
from thrifty.checkpoint.hub import resolve
from thrifty.errors import ThriftyError
from thrifty.models import save_packed
from thrifty.nn import BitLinear, pack
from thrifty.nn.lora import MergedLayer, load_adapter, merge_adapter, requantize
from thrifty.train.checkpoints import read_record
from thrifty.train.evaluate import bits_per_byte
from thrifty.train.initial import read_model
from thrifty.train.start import copy_texts

#: Names of peft's files, and of the report of a merge.
ADAPTER, REPORT = "adapter_config.json", "merging.json"


@dataclass(frozen=True)
class Merging:
    """What merging an adapter lost."""

    layers: list[MergedLayer]
    #: Bits per byte of a text by the base, by the base with its adapter, and by the merged model; empty without a text.
    bits_per_byte: dict[str, float]

    def by_kind(self) -> dict[str, list[MergedLayer]]:
        """The layers by the last parts of their names."""
        kinds: dict[str, list[MergedLayer]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
        return kinds


def load_adapted(folder: Path) -> Any:
    """The packed model of an adapter's folder with the adapter beside its layers, float32.

    Raises ThriftyError where the model that the adapter belongs to is not where its configuration says.
    """
    name = read_json(folder / ADAPTER).get("base_model_name_or_path")
    base = resolve(str(name))
    if not (base / "config.json").is_file():
        rule = f"[adapter] the model of the adapter must be there; {folder / ADAPTER} says {name}"
        raise ThriftyError(f"{rule}, which is no model; correct its base_model_name_or_path")
    model = read_model(base, dtype=torch.float32)
    packed = pack(model) if any(isinstance(module, BitLinear) for module in model.modules()) else model
    adapted = load_adapter(packed, folder).eval()
    settings = read_record(folder).get("settings", {})
    if settings.get("recipe", {}).get("training", {}).get("lora_requantized"):
        requantize(adapted)
    return adapted


def merge_folder(
    adapter: Path, output: Path, dtype: torch.dtype = torch.bfloat16, overwrite: bool = False, text: str | None = None
) -> Merging:
    """Write the packed model that takes in the adapter of a folder, and `merging.json`, which says what that lost.

    Codes and scales are those of `thrifty.nn.lora.merged_codes`. text: what base, base with adapter and merged model
    are compared on. `output` is written whole or not at all.
    """
    model = load_adapted(adapter)
    read = _reader(adapter, text)
    scores = {}
    if read is not None:
        with model.disable_adapter():
            scores["base"] = read(model)
        scores["adapter"] = read(model)
    merged, layers = merge_adapter(model)
    if read is not None:
        scores["merged"] = read(merged)
    report = Merging(layers, scores)
    with atomic_folder(output, overwrite) as folder:
        save_packed(merged, folder, dtype)
        copy_texts(adapter, folder)
        (folder / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _reader(adapter: Path, text: str | None) -> Callable[[Any], float] | None:
    """What gives a model's bits per byte of the text."""
    if text is None:
        return None
    file = adapter / "tokenizer.json"
    if not file.is_file():
        raise ThriftyError(f"[pack] text needs a tokenizer; {adapter} has no tokenizer.json; leave the text out")
    tokenizer = Tokenizer.from_file(str(file))
    return lambda model: bits_per_byte(model, tokenizer, text)
