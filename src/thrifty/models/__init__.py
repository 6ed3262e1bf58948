"""Models on Hugging Face conventions: one decoder, and configurations of it. Imported when a name is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thrifty.models.bitnet import BitNetConfig, BitNetForCausalLM, BitNetModel, BitNetTransformer
    from thrifty.models.checkpoints import round_dense_parameters, save_packed
    from thrifty.models.configuration import ThriftyConfig
    from thrifty.models.decoder import ThriftyForCausalLM, ThriftyModel

_HOMES = {
    "BitNetConfig": "bitnet",
    "BitNetForCausalLM": "bitnet",
    "BitNetModel": "bitnet",
    "BitNetTransformer": "bitnet",
    "ThriftyConfig": "decoder",
    "ThriftyForCausalLM": "decoder",
    "ThriftyModel": "decoder",
    "round_dense_parameters": "checkpoints",
    "save_packed": "checkpoints",
}

__all__ = [
    "BitNetConfig",
    "BitNetForCausalLM",
    "BitNetModel",
    "BitNetTransformer",
    "ThriftyConfig",
    "ThriftyForCausalLM",
    "ThriftyModel",
    "round_dense_parameters",
    "save_packed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'thrifty.models' has no attribute '{name}'")
    return getattr(import_module(f"thrifty.models.{_HOMES[name]}"), name)
