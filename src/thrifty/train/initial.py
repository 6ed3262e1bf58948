"""First values of the weights."""

import math

import torch
from torch import nn

from thrifty.train.presets import Recipe

#: Projections that write into the residual stream.
OUTPUTS = ("o_proj.weight", "down_proj.weight")


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
