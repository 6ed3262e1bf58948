"""BitNet b1.58 as a configuration of the decoder, and the seed's transformer."""

from typing import Any

import torch
from torch import Tensor, nn

from thrifty.models.configuration import BitNetConfig, ThriftyConfig
from thrifty.models.decoder import ThriftyForCausalLM, ThriftyModel

__all__ = ["BitNetConfig", "BitNetForCausalLM", "BitNetModel", "BitNetTransformer"]


class BitNetModel(ThriftyModel):
    """`ThriftyModel` with BitNet's defaults."""

    config: BitNetConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class BitNetForCausalLM(ThriftyForCausalLM):
    """`ThriftyForCausalLM` with BitNet's defaults; saves folders that plain transformers loads as its own BitNet."""

    config: BitNetConfig  # pyright: ignore[reportIncompatibleVariableOverride]


class BitNetTransformer(nn.Module):
    """The BitNet seed's transformer: token ids [B, T] to float32 logits [B, T, num_tokens].

    A causal pre-norm decoder with rotary positions, heads of dim_head features, and a feed-forward
    Linear -> GELU -> Linear of dim * ff_mult features; embedding and head are dense, all other layers ternary.
    Parameters are named as in `ThriftyForCausalLM`. Raises ThriftyError beyond max_positions tokens.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        *,
        max_positions: int = 2048,
    ) -> None:
        super().__init__()
        self.config = ThriftyConfig(
            vocab_size=num_tokens,
            hidden_size=dim,
            intermediate_size=dim * ff_mult,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            head_dim=dim_head,
            hidden_act="gelu",
            max_position_embeddings=max_positions,
            tie_word_embeddings=False,
            feed_forward="mlp",
            norm_placement="pre",
        )
        decoder = ThriftyForCausalLM(self.config)
        self.model, self.lm_head = decoder.model, decoder.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens, use_cache=False).last_hidden_state).float()

    def to_causal_lm(self) -> ThriftyForCausalLM:
        """The same parameters, shared, as a `ThriftyForCausalLM`: to save, pack or train as one."""
        with torch.device("meta"):
            decoder = ThriftyForCausalLM(self.config)
        decoder.model, decoder.lm_head = self.model, self.lm_head
        return decoder.train(self.training)

    def generate(self, tokens: Tensor, **options: Any) -> Tensor:
        """Token ids [B, T + new], continued as transformers' `generate` does, with its options."""
        decoder: Any = self.to_causal_lm()
        return decoder.generate(tokens, **options)
