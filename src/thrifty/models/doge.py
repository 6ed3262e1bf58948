"""Doge as a configuration of the decoder: dynamic mask attention, scaled residuals, experts by choice."""

from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification

from thrifty.models.configuration import DogeConfig
from thrifty.models.decoder import ThriftyForCausalLM, ThriftyModel, ThriftyPreTrainedModel

__all__ = ["DogeConfig", "DogeForCausalLM", "DogeForSequenceClassification", "DogeModel"]


class DogeModel(ThriftyModel):
    """`ThriftyModel` with Doge's defaults."""

    config: DogeConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class DogeForCausalLM(ThriftyForCausalLM):
    """`ThriftyForCausalLM` with Doge's defaults; reads and saves transformers' folders, and reads the seed's."""

    config: DogeConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class DogeForSequenceClassification(GenericForSequenceClassification, ThriftyPreTrainedModel):
    """The decoder with a linear `score` [num_labels, hidden_size] of each row's last token that is not padding.

    Token ids [B, T] to logits [B, num_labels]; with labels, the loss that transformers takes for them. A folder of a
    language model loads too: `score` is new then.
    """

    config: DogeConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    new_keys = ("score.weight",)

    def __init__(self, config: DogeConfig, *, stored: bool = False) -> None:
        ThriftyPreTrainedModel.__init__(self, config)
        self.num_labels = int(config.num_labels or 0)
        self.model = ThriftyModel(config, stored=stored)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.finish(stored)
