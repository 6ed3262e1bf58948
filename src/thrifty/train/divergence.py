"""Stopping where a run has left the finite numbers, with what a person needs to see why."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor, nn

from thrifty.checkpoint import atomic_file
from thrifty.errors import ThriftyError
from thrifty.train.shards import local

#: The batch of the step whose loss was not finite, in the folder of the run.
DIVERGED = "diverged.json"
WAY_OUT = "train anew (--fresh) with lower learning rates, or with --set clip=1"


def check_loss(
    loss: Tensor, step: int, inputs: Mapping[str, Any], rates: Sequence[float], tokenizer: Tokenizer, output: Path
) -> None:
    """Raises ThriftyError where the loss is not finite, having written step, learning rates and batch to `DIVERGED`."""
    value = loss.item()
    if math.isfinite(value):
        return
    batch = {name: tensor.tolist() for name, tensor in inputs.items() if isinstance(tensor, Tensor)}
    texts = [tokenizer.decode(row, skip_special_tokens=False) for row in batch["input_ids"]]
    record = {"step": step, "loss": str(value), "learning_rates": list(rates), "texts": texts, "batch": batch}
    with atomic_file(output / DIVERGED, "w") as file:
        json.dump(record, file)
    rule = f"[train] the loss must be finite; got {value} in step {step}, whose batch is in {output / DIVERGED}"
    raise ThriftyError(f"{rule}; {WAY_OUT}")


def check_weights(model: nn.Module, step: int) -> None:
    """Raises ThriftyError where a weight is not finite: such a checkpoint would be of no use."""
    for name, parameter in model.named_parameters():
        if not local(parameter).isfinite().all():
            rule = f"[train] weights must be finite to be saved; {name} is not after step {step}"
            raise ThriftyError(f"{rule}; {WAY_OUT}; the checkpoints before are whole")
