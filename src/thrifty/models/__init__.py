"""Models on Hugging Face conventions: one decoder, and configurations of it. Imported when a name is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thrifty.models.bitnet import BitNetConfig, BitNetForCausalLM, BitNetModel, BitNetTransformer
    from thrifty.models.checkpoints import round_dense_parameters, save_packed
    from thrifty.models.cheems import CheemsConfig, CheemsForCausalLM, CheemsModel
    from thrifty.models.configuration import ThriftyConfig
    from thrifty.models.decoder import ThriftyForCausalLM, ThriftyModel
    from thrifty.models.doge import DogeConfig, DogeForCausalLM, DogeForSequenceClassification, DogeModel
    from thrifty.models.matmulfree import MatMulFreeConfig, MatMulFreeForCausalLM, MatMulFreeModel

#: Modules whose import registers a family with transformers' Auto classes.
_FAMILIES = ("bitnet", "cheems", "doge", "matmulfree")
_HOMES = {
    "BitNetTransformer": "bitnet",
    "CheemsConfig": "cheems",
    "CheemsForCausalLM": "cheems",
    "CheemsModel": "cheems",
    "BitNetConfig": "bitnet",
    "BitNetForCausalLM": "bitnet",
    "BitNetModel": "bitnet",
    "DogeConfig": "doge",
    "DogeForCausalLM": "doge",
    "DogeForSequenceClassification": "doge",
    "DogeModel": "doge",
    "MatMulFreeConfig": "matmulfree",
    "MatMulFreeForCausalLM": "matmulfree",
    "MatMulFreeModel": "matmulfree",
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
    "CheemsConfig",
    "CheemsForCausalLM",
    "CheemsModel",
    "DogeConfig",
    "DogeForCausalLM",
    "DogeForSequenceClassification",
    "DogeModel",
    "MatMulFreeConfig",
    "MatMulFreeForCausalLM",
    "MatMulFreeModel",
    "ThriftyConfig",
    "ThriftyForCausalLM",
    "ThriftyModel",
    "round_dense_parameters",
    "save_packed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'thrifty.models' has no attribute '{name}'")
    for family in _FAMILIES:
        import_module(f"thrifty.models.{family}")
    return getattr(import_module(f"thrifty.models.{_HOMES[name]}"), name)
