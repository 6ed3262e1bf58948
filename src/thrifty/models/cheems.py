"""Cheems as a configuration of the decoder: seven layers of SSD to one of dynamic mask attention."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from thrifty.models.configuration import CheemsConfig
from thrifty.models.decoder import ThriftyForCausalLM, ThriftyModel

__all__ = ["CheemsConfig", "CheemsForCausalLM", "CheemsModel"]


class CheemsModel(ThriftyModel):
    """`ThriftyModel` with Cheems' defaults."""

    config: CheemsConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class CheemsForCausalLM(ThriftyForCausalLM):
    """`ThriftyForCausalLM` with Cheems' defaults; reads the seed's folders too."""

    config: CheemsConfig  # pyright: ignore[reportIncompatibleVariableOverride]


AutoConfig.register("cheems", CheemsConfig, exist_ok=True)
AutoModel.register(CheemsConfig, CheemsModel, exist_ok=True)
AutoModelForCausalLM.register(CheemsConfig, CheemsForCausalLM, exist_ok=True)
