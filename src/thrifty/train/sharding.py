"""FSDP2: each process keeps a share of parameters, gradients and optimizer state, and layers are gathered in turn."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from thrifty.models import ThriftyForCausalLM
from thrifty.nn import BitLinear
from thrifty.ops.sharded_weight import ShardedWeight, pack_codes
from thrifty.spec import quantizers
from thrifty.train.process import world_size
from thrifty.train.shards import local

#: Folder of a checkpoint that holds what is sharded, in torch's distributed format.
SHARDS = "shards"


def shard(model: ThriftyForCausalLM, two_bits: bool) -> None:
    """Spread the model over the processes, in place: the layers one by one, and embedding, norm and head together.

    two_bits: of ternary weights only codes are gathered (`refresh_codes`), where the number of processes divides their
    rows. Everything is computed as on one process; autocast, not a policy of FSDP2, lowers precision, so that codes are
    those of the float32 weights.
    """
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    if two_bits:
        for module in model.modules():
            if isinstance(module, BitLinear) and _has_codes(module) and len(module.weight) % mesh.size() == 0:
                module.weight = nn.Parameter(ShardedWeight(module.weight.data))
                module.register_state_dict_post_hook(_plain_state)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    ends = [model.model.embed_tokens, model.model.norm, model.lm_head]
    fully_shard(ends, mesh=mesh, reshard_after_forward=False)  # pyright: ignore[reportArgumentType, reportCallIssue]
    fully_shard(model, mesh=mesh)
    refresh_codes(model)


def _has_codes(module: BitLinear) -> bool:
    return module.kind == "ternary" and not module.transposed


def _plain_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Saved tensors are plain ones: over the same memory, so that loading into them loads the model."""
    weight = state[f"{prefix}weight"]
    if isinstance(weight, DTensor):
        state[f"{prefix}weight"] = DTensor.from_local(
            local(weight.detach()), weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
        )


def _sharded_weights(model: nn.Module) -> Iterator[tuple[DTensor, ShardedWeight]]:
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and isinstance(parameter._local_tensor, ShardedWeight):
            yield parameter, parameter._local_tensor


@torch.no_grad()
def refresh_codes(model: nn.Module, *_: Any) -> None:
    """Compute the codes that are gathered of ternary weights, after a change of the weights: one all-reduce for all.

    The sum behind the scale (`thrifty.spec.quantizers.absmean`) is of float64 here. One process adds in float32, so
    the scales, rounded to bfloat16, differ where the mean lies within some 1e-7 of the middle between two values.
    """
    weights = list(_sharded_weights(model))
    if not weights:
        return
    sums = torch.stack([shard.data_.abs().sum(dtype=torch.float64) for _, shard in weights])
    torch.distributed.all_reduce(sums, group=weights[0][0].device_mesh.get_group())
    for (whole, shard), total in zip(weights, sums, strict=True):
        mean = (total / whole.numel()).float()
        shard.scale = quantizers.absmean(mean, torch, lambda x: x.to(torch.bfloat16).float())
        shard.codes = pack_codes(quantizers.ternary_codes(shard.data_, shard.scale, torch))


def gathered_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes that a process receives and keeps to compute with the whole model once: as gathered, and as floats."""
    sizes = [0, 0]
    for parameter in model.parameters():
        shard = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
        floats = parameter.numel() * parameter.itemsize
        codes = isinstance(shard, ShardedWeight)
        sizes[0] += len(parameter) * -(-parameter.shape[1] // 4) if codes else floats
        sizes[1] += floats
    return sizes[0], sizes[1]


def whole_model(model: Any, kind: Callable[[Any], ThriftyForCausalLM]) -> Any:
    """A model of `kind` with the parameters of a sharded one, on the first process; the others get theirs back.

    All processes call it.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return model
    whole = kind(model.config)
    whole.load_state_dict(state)
    return whole


class Sharded(Trainer):
    """A Trainer of a model that `shard` spread: accelerate neither wraps nor moves it, and checkpoints are shards.

    accelerate's own FSDP is for GPUs only, and gathers bfloat16 copies under autocast, whose codes are others.
    """

    def __init__(self, *, model: Any, **kwargs: Any) -> None:
        model._is_accelerate_prepared = True
        self.sharded = model
        super().__init__(model=model, **kwargs)

    def _move_model_to_device(self, *_: Any) -> None:
        pass

    def autocast_smart_context_manager(self, *_: Any, **__: Any) -> Any:
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args)
        optimizer.register_step_post_hook(lambda *_: refresh_codes(self.sharded))
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Parameters are saved with the optimizer's state."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save(self._content(), checkpoint_id=Path(output_dir) / SHARDS)
        if self.args.should_save:
            torch.save(self._schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, *_: Any) -> None:
        pass

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        content = self._content()
        load(content, checkpoint_id=Path(checkpoint) / SHARDS)
        set_state_dict(
            self.sharded, self._inner, model_state_dict=content["model"], optim_state_dict=content["optimizer"]
        )
        self._schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        refresh_codes(self.sharded)

    def _content(self) -> dict[str, Any]:
        parameters, state = get_state_dict(self.sharded, self._inner)
        return {"model": parameters, "optimizer": state}

    @property
    def _inner(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _schedule(self) -> Any:
        return self.lr_scheduler
