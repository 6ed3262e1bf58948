"""Warming quantisation up: the share of it that counts, by the step of a run."""

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from thrifty.nn import BitLinear
from thrifty.train.recipe import Training


def quantization_share(progress: float, curve: str = "linear", steepness: float = 10.0) -> float:
    """lambda at progress t, 1 from t = 1 on: t; 1 - (1 - t)^k; or sigmoid(k (t - 1/2)), scaled to begin at 0, end at 1.

    curve: one of `thrifty.train.recipe.CURVES`; steepness: k, which a straight line ignores. HF's "Fine-tuning LLMs to
    1.58bit" (2024), section "Warm-up quantization", tried the three, with k from 4 to 10 and from 15 to 100.
    """
    t = min(max(progress, 0.0), 1.0)
    if t in (0.0, 1.0) or curve == "linear":
        return t
    if curve == "exponential":
        return 1 - (1 - t) ** steepness
    # sigmoid(k (t - 1/2)) = (1 + tanh(k (t - 1/2) / 2)) / 2
    return (1 + math.tanh(steepness * (t - 0.5) / 2) / math.tanh(steepness / 4)) / 2


def set_quantization(model: nn.Module, share: float) -> None:
    """Let `share` of the quantisation of every `BitLinear` count: 0 is a dense layer, 1 the layer as it is packed.

    Below 1 all layers read one tensor, which later calls refill, so that compiled layers stay as they are.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BitLinear)]
    if not layers:
        return
    tensor = None
    if share < 1:
        tensor = layers[0].quantization
        if tensor is None:
            tensor = torch.empty((), device=layers[0].weight.device)
        tensor.fill_(share)
    for layer in layers:
        layer.quantization = tensor


class QuantizationWarmup(TrainerCallback):
    """Sets lambda before every step, and logs it as "lambda"; after the run it is 1.

    It follows from the step alone, so that a resumed run goes on with the right one. Evaluations during the warm-up see
    the model as it is trained.
    """

    def __init__(self, model: nn.Module, training: Training) -> None:
        self.model, self.training = model, training
        self.share = 1.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._set(state)

    def on_step_begin(self, args, state, control, **kwargs):
        self._set(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The trainer keeps a copy of what it logs, made before.
        for entry in (logs, state.log_history[-1]):
            if entry is not None:
                entry["lambda"] = self.share

    def on_train_end(self, args, state, control, **kwargs):
        set_quantization(self.model, 1.0)

    def _set(self, state) -> None:
        training = self.training
        steps = training.quantization_warmup * training.steps
        progress = state.global_step / steps if steps else 1.0
        self.share = quantization_share(progress, training.quantization_curve, training.quantization_steepness)
        set_quantization(self.model, self.share)
