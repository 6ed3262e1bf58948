"""Tensors whose rows are spread over processes (FSDP2's DTensors): their local part, and work on whole ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thrifty.ops.sharded_weight import ShardedWeight


def is_sharded(tensor: Any) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """The part of a tensor that this process has, with its memory; all of it where it is not sharded."""
    tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return tensor.data_ if isinstance(tensor, ShardedWeight) else tensor


def spread(
    rows: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    work: Callable[[list[Tensor]], list[Tensor]],
    group: torch.distributed.ProcessGroup,
) -> list[Tensor]:
    """The rows of `work(matrices)` that belong here; each process gathers, works on and gives back a share of them.

    rows: this process' rows of each matrix, cut as FSDP2 cuts them; shapes: of the whole matrices. `work` takes and
    returns whole matrices of one dtype. A matrix travels twice, to the one process that works on it and back.
    """
    world, rank = group.size(), group.rank()
    owned = [list(range(owner, len(rows), world)) for owner in range(world)]
    counts = [[_rows_of(shape[0], process, world) for process in range(world)] for shape in shapes]
    sent = [sum(rows[i].numel() for i in owned[owner]) for owner in range(world)]
    taken = [sum(counts[i][process] * shapes[i][1] for i in owned[rank]) for process in range(world)]
    outgoing = torch.cat([rows[i].flatten() for mine in owned for i in mine])
    pieces = iter(_exchange(outgoing, sent, taken, group).split(_sizes(owned[rank], counts, shapes, range(world))))
    shards = [[next(pieces).view(-1, shapes[i][1]) for i in owned[rank]] for _ in range(world)]
    results = work([torch.cat(parts) for parts in zip(*shards, strict=True)]) if owned[rank] else []
    parts = [result.split(counts[i]) for i, result in zip(owned[rank], results, strict=True)]
    returned = [part[process].flatten() for process in range(world) for part in parts]
    returning = torch.cat(returned) if returned else outgoing.new_empty(0)
    order = [i for mine in owned for i in mine]
    back = _exchange(returning, taken, sent, group).split([rows[i].numel() for i in order])
    placed = dict(zip(order, back, strict=True))
    return [placed[i].view(rows[i].shape) for i in range(len(rows))]


def _rows_of(count: int, process: int, world: int) -> int:
    """Rows of `count` that torch.chunk gives to a process."""
    each = -(-count // world)
    return max(0, min(each, count - process * each))


def _sizes(indices: Sequence[int], counts: Any, shapes: Any, processes: Sequence[int]) -> list[int]:
    return [counts[i][process] * shapes[i][1] for process in processes for i in indices]


def _exchange(outgoing: Tensor, sent: list[int], taken: list[int], group: Any) -> Tensor:
    """Elements for and from each process. Sent as bytes: gloo does not know every dtype."""
    incoming = outgoing.new_empty(sum(taken))
    size = outgoing.itemsize
    torch.distributed.all_to_all_single(
        incoming.view(torch.uint8),
        outgoing.view(torch.uint8),
        [size * n for n in taken],
        [size * n for n in sent],
        group=group,
    )
    return incoming
