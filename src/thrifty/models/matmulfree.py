"""The matmul-free language model as a configuration of the decoder: MLGRU and GLU of ternary linears."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from thrifty.models.configuration import MatMulFreeConfig
from thrifty.models.decoder import ThriftyForCausalLM, ThriftyModel

__all__ = ["MatMulFreeConfig", "MatMulFreeForCausalLM", "MatMulFreeModel"]


class MatMulFreeModel(ThriftyModel):
    """`ThriftyModel` with the defaults of the matmul-free language model."""

    config: MatMulFreeConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class MatMulFreeForCausalLM(ThriftyForCausalLM):
    """`ThriftyForCausalLM` with the defaults of the matmul-free language model. Texts can be of any length."""

    config: MatMulFreeConfig  # pyright: ignore[reportIncompatibleVariableOverride]


AutoConfig.register("matmulfree", MatMulFreeConfig, exist_ok=True)
AutoModel.register(MatMulFreeConfig, MatMulFreeModel, exist_ok=True)
AutoModelForCausalLM.register(MatMulFreeConfig, MatMulFreeForCausalLM, exist_ok=True)
