"""The processes of a run: a launcher (torchrun, `accelerate launch`) starts them and tells each its place."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from thrifty.errors import ThriftyError
from thrifty.train.process import is_first, world_size

T = TypeVar("T")
#: How long a process waits for another: one trains the tokenizer, and judges the model at the end.
PATIENCE = timedelta(hours=2)


def join(sharded: bool) -> None:
    """Meet the other processes of the run, if there are any. sharded: one that is alone must have met itself.

    Raises ThriftyError for what a launcher was told and the recipe decides.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        way_out = "launch without it, and train with --set sharding=fsdp"
        raise ThriftyError(f"[train] the recipe decides how a model is sharded; got accelerate's --use_fsdp; {way_out}")
    if distributed.is_initialized():
        return
    if "RANK" not in os.environ:
        if sharded:
            alone = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            distributed.init_process_group(_backend(), store=alone, rank=0, world_size=1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(_backend(), timeout=PATIENCE)


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` returns or raises on the first process, on all of them; the others wait for it."""
    if world_size() == 1:
        return compute()
    outcome: list = [None, None]
    if is_first():
        try:
            outcome = [compute(), None]
        except ThriftyError as problem:
            outcome = [None, problem]
    distributed.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
