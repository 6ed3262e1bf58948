"""Tokens as training blocks: contiguous, packed, and drawn in an order fixed by the seed."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch.utils.data import Dataset

from thrifty.errors import ThriftyError
from thrifty.train.corpus import Mixture

#: What the model is given of a block.
Block = Mapping[str, torch.Tensor]


class PackedBlocks(Dataset):
    """`count` blocks of `length` tokens, each a contiguous piece of one stream; block i depends on i and the seed only.

    A stream (int32 [n]) is read again and again: cut at a new phase in every reading, its pieces shuffled. Which
    stream block i comes from is drawn with the shares that `mixture` has at progress i / count. So a run resumed at
    block i goes on as if it had never stopped. begin: as for `block`.

    Errors: a stream that has a share but not one block.
    """

    def __init__(
        self,
        streams: Mapping[str, np.ndarray],
        mixture: Mixture,
        length: int,
        count: int,
        seed: int,
        begin: int | None = None,
    ):
        self.length, self.begin = length, begin
        rng = np.random.default_rng(seed)
        drawn = draw_streams(list(streams), mixture, count, rng)
        first = np.zeros(count, np.int64)
        for k, (name, stream) in enumerate(streams.items()):
            wanted = int((drawn == k).sum())
            if wanted and len(stream) < length:
                rule = f"[train] the text '{name}' must hold at least one sequence of {length} tokens"
                raise ThriftyError(f"{rule}; got {len(stream)}; give more text or a shorter --sequence-length")
            first[drawn == k] = read_again_and_again(len(stream), length, wanted, rng)
        self.streams = list(streams.values())
        self.drawn, self.first = drawn, first

    def __len__(self) -> int:
        return len(self.drawn)

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Block:
        start = self.first[i]
        return block(self.streams[self.drawn[i]][start : start + self.length], self.begin)


def block(tokens: np.ndarray, begin: int | None) -> Block:
    """What the model is given of tokens [T]: input_ids and labels; with `begin` also position_ids.

    Those count from 0 at each token `begin` and at the first token, so that no document sees another. The token that
    begins a document stays a label: it is what ends the one before, and nothing of the document itself.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))
    if begin is None:
        return {"input_ids": ids, "labels": ids}
    places = torch.arange(len(ids))
    starts = torch.where(ids == begin, places, 0).cummax(0).values
    return {"input_ids": ids, "labels": ids, "position_ids": places - starts}


def draw_streams(names: list[str], mixture: Mixture, count: int, rng: np.random.Generator) -> np.ndarray:
    """For each of `count` blocks the index of its stream, by the shares that `mixture` has at that point of the run."""
    progress = np.arange(count) / max(count, 1)
    points = [point for point, _ in mixture]
    shares = np.stack([np.interp(progress, points, [mix.get(name, 0.0) for _, mix in mixture]) for name in names])
    edges = np.cumsum(shares, axis=0)  # [streams, count]
    if (edges[-1:] <= 0).any():
        raise ThriftyError(f"[train] the mixture must give some of {', '.join(names)} a share; got {mixture}")
    return (rng.random(count) * edges[-1] >= edges).sum(axis=0)


def read_again_and_again(size: int, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """First tokens of `count` pieces: readings of a stream of `size` tokens, each cut at a new phase and shuffled."""
    readings = []
    missing = count
    while missing > 0:
        phase = rng.integers(min(length, size - length + 1))
        pieces = rng.permutation(np.arange(phase, size - length + 1, length))[:missing]
        readings.append(pieces)
        missing -= len(pieces)
    return np.concatenate([*readings, np.empty(0, np.int64)])
