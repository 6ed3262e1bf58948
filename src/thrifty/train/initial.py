"""A preset's model, and the first values of its weights."""

import math
from dataclasses import asdict
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from thrifty import models
from thrifty.train.presets import Preset, Recipe
from thrifty.train.tokenizer import END

#: Classes of `thrifty.train.presets.MODELS`.
FAMILIES: dict[str, tuple[Any, type[models.ThriftyForCausalLM]]] = {
    "bitnet": (models.BitNetConfig, models.BitNetForCausalLM),
    "doge": (models.DogeConfig, models.DogeForCausalLM),
    "cheems": (models.CheemsConfig, models.CheemsForCausalLM),
    "matmulfree": (models.MatMulFreeConfig, models.MatMulFreeForCausalLM),
}

#: Projections that write into the residual stream.
OUTPUTS = ("o_proj.weight", "down_proj.weight")


def new_model(preset: Preset, tokenizer: Tokenizer) -> models.ThriftyForCausalLM:
    """The preset's model, with the vocabulary of the tokenizer."""
    shape: dict[str, Any] = asdict(preset.shape) | {"vocab_size": tokenizer.get_vocab_size()}
    make_config, make_model = FAMILIES[shape.pop("model")]
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    linear, experts = shape.pop("linear"), shape["num_experts"]
    if linear != "default":
        # Low-bit layers need norms that dense ones can do without.
        shape |= {"linear": linear, "norm_placement": "pre" if linear == "dense" else "sub_ln"}
    if experts:
        shape["feed_forward"] = "cdmoe"
    else:
        del shape["num_experts"], shape["num_experts_per_tok"]
    if make_config is models.CheemsConfig:
        # Few layers have a dynamic mask too, the last one.
        shape["attn_layer_period"] = min(8, shape["num_hidden_layers"])
    end = tokenizer.token_to_id(END)
    tokens: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return make_model(make_config(**shape, **tokens, rope_parameters=rope, hidden_act="silu", tie_word_embeddings=True))


@torch.no_grad()
def initialize(model: nn.Module, recipe: Recipe) -> None:
    """Normal values: 0.02 for the embedding, 1 / √in for matrices, those of `OUTPUTS` times `recipe.output_scale`.

    A ternary matrix forgets the scale of its weights, but not what the steps are measured against: a latent weight
    changes its code after a number of steps in proportion to its size.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scale = 0.02 if "embed" in name or "lm_head" in name else 1 / math.sqrt(parameter.shape[1])
            parameter.normal_(0.0, scale * (recipe.output_scale if name.endswith(OUTPUTS) else 1.0))
