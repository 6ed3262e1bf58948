"""A recipe's model, and the first values of its weights."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from thrifty import models
from thrifty.checkpoint.config import read_json
from thrifty.train.recipe import Shape, Training
from thrifty.train.tokenizer import END

#: Classes of `thrifty.train.recipe.MODELS`.
FAMILIES: dict[str, tuple[Any, type[models.ThriftyForCausalLM]]] = {
    "bitnet": (models.BitNetConfig, models.BitNetForCausalLM),
    "doge": (models.DogeConfig, models.DogeForCausalLM),
    "cheems": (models.CheemsConfig, models.CheemsForCausalLM),
    "matmulfree": (models.MatMulFreeConfig, models.MatMulFreeForCausalLM),
}


def read_model(folder: Path, **options: Any) -> models.ThriftyForCausalLM:
    """The model of a folder, in the class of its family; options are those of `from_pretrained`."""
    kind = read_json(folder / "config.json").get("model_type")
    _, family = FAMILIES.get(str(kind), (None, models.ThriftyForCausalLM))
    return family.from_pretrained(folder, **options)


#: Projections that write into the residual stream.
OUTPUTS = ("o_proj.weight", "down_proj.weight")


def new_model(shape: Shape, tokenizer: Tokenizer, end: int | None = None) -> models.ThriftyForCausalLM:
    """A model of that shape, with the vocabulary of the tokenizer. end: the token between texts, by default `END`."""
    fields: dict[str, Any] = asdict(shape) | {"vocab_size": tokenizer.get_vocab_size()}
    make_config, make_model = FAMILIES[fields.pop("model")]
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    linear, experts = fields.pop("linear"), fields["num_experts"]
    if linear != "default":
        # Low-bit layers need norms that dense ones can do without.
        fields |= {"linear": linear, "norm_placement": "pre" if linear == "dense" else "sub_ln"}
    if experts:
        fields["feed_forward"] = "cdmoe"
    else:
        del fields["num_experts"], fields["num_experts_per_tok"]
    if make_config is models.CheemsConfig:
        # Few layers have a dynamic mask too, the last one.
        fields["attn_layer_period"] = min(8, fields["num_hidden_layers"])
    end = tokenizer.token_to_id(END) if end is None else end
    tokens: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return make_model(
        make_config(**fields, **tokens, rope_parameters=rope, hidden_act="silu", tie_word_embeddings=True)
    )


@torch.no_grad()
def initialize(model: nn.Module, training: Training) -> None:
    """Normal values: 0.02 for the embedding, 1 / √in for matrices, those of `OUTPUTS` times `training.output_scale`.

    A ternary matrix forgets the scale of its weights, but not what the steps are measured against: a latent weight
    changes its code after a number of steps in proportion to its size.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scale = 0.02 if "embed" in name or "lm_head" in name else 1 / math.sqrt(parameter.shape[1])
            parameter.normal_(0.0, scale * (training.output_scale if name.endswith(OUTPUTS) else 1.0))
