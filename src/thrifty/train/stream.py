"""Training blocks from documents that are read as they are needed, and a state to go on from."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from thrifty.errors import ThriftyError
from thrifty.train.blocks import Block, block
from thrifty.train.sources import Source

#: Documents, and tokens, that wait in a source's buffer to be drawn at random.
DOCUMENTS, TOKENS = 1024, 1 << 22
#: Documents that the tokenizer gets at once.
TOGETHER = 32
#: States that are kept, one a batch: the loader reads a batch ahead of the step, and a few are looked at before all.
_KEPT = 16
#: Texts to tokens, int32 [n], each after the token that begins a text.
Encode = Callable[[Sequence[str]], list[np.ndarray]]


class _Lane:
    """The tokens of one source: documents in an order shuffled through a buffer, laid end to end, read again and again.

    Of the documents of a reading the first `heldout` are left out, and of the others every `world`-th is taken.
    """

    def __init__(self, source: Source, encode: Encode, heldout: int, rank: int, world: int, seed: int):
        self.source, self.encode, self.heldout, self.rank, self.world = source, encode, heldout, rank, world
        self.rng = np.random.default_rng(seed)
        self.buffer: list[np.ndarray] = []
        self.rest = np.empty(0, np.int32)
        #: Where the next document is: the point of the source, and its number in this reading.
        self.point, self.number = None, 0
        self.reader: Iterator[tuple[str, Any]] | None = None

    def block(self, length: int) -> np.ndarray:
        pieces, missing = [self.rest], length - len(self.rest)
        while missing > 0:
            pieces.append(self._draw())
            missing -= len(pieces[-1])
        tokens = np.concatenate(pieces)
        self.rest = tokens[length:]
        return tokens[:length]

    def state(self) -> dict[str, Any]:
        """All that decides what comes next. Arrays are shared, for none is written to."""
        kept = ("point", "number", "rest")
        return {name: getattr(self, name) for name in kept} | {
            "buffer": list(self.buffer),
            "rng": self.rng.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.point, self.number, self.rest = state["point"], state["number"], state["rest"]
        self.buffer, self.reader = list(state["buffer"]), None
        self.rng.bit_generator.state = state["rng"]

    def _draw(self) -> np.ndarray:
        held = sum(map(len, self.buffer))
        while len(self.buffer) + TOGETHER <= DOCUMENTS and held < TOKENS:
            read = self.encode(self._read(TOGETHER))
            self.buffer += read
            held += sum(map(len, read))
        i = int(self.rng.integers(len(self.buffer)))
        self.buffer[i], self.buffer[-1] = self.buffer[-1], self.buffer[i]
        return self.buffer.pop()

    def _read(self, count: int) -> list[str]:
        """The next documents of this process, from the beginning again where the source ends."""
        texts: list[str] = []
        empty = 0
        while len(texts) < count:
            if self.reader is None:
                self.reader = self.source.read(self.point)
            for text, point in self.reader:
                self.point = point
                mine = self.number >= self.heldout and (self.number - self.heldout) % self.world == self.rank
                self.number += 1
                if mine:
                    texts.append(text)
                    empty = 0
                    if len(texts) == count:
                        return texts
            self.point, self.number, self.reader = None, 0, None
            empty += 1
            if empty > 1:
                rule = f"[train] every process must find a document in {self.source.name}; number {self.rank} of"
                raise ThriftyError(f"{rule} {self.world} finds none beside those held out; give more, or hold out less")
        return texts


class StreamedBlocks(Dataset):
    """`count` blocks of `length` tokens, packed from documents that sources give while training.

    Which source a block comes from is drawn by `shares`. Documents pass a buffer of DOCUMENTS (TOKENS at most), from
    which they are drawn by the seed, and a source that ends begins again. Of `world` processes each reads its own
    share of every source; it asks for the blocks that accelerate deals it: batches of `batch`, in turns. Blocks are
    cheap in order; an earlier one is made again from the nearest state that is kept. `save` and `restore` keep the
    state beside a checkpoint, so that nothing is read twice. begin: the token that begins a document, where documents
    are to be told apart (`thrifty.train.blocks.block`).

    Errors: a source without documents, a state of another number of processes, one that is not there.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        shares: Sequence[float],
        heldout: Sequence[int],
        encode: Encode,
        length: int,
        count: int,
        seed: int,
        *,
        batch: int = 1,
        rank: int = 0,
        world: int = 1,
        begin: int | None = None,
    ):
        self.length, self.count, self.batch, self.rank, self.world, self.begin = (
            length,
            count,
            batch,
            rank,
            world,
            begin,
        )
        seeds = np.random.SeedSequence([seed, rank]).generate_state(len(sources) + 1)
        lanes = zip(sources, heldout, seeds[1:], strict=True)
        self.lanes = [_Lane(source, encode, skipped, rank, world, int(s)) for source, skipped, s in lanes]
        self.edges = np.cumsum(np.array(shares, float) / sum(shares))
        self.rng = np.random.default_rng(seeds[0])
        #: Number of the next block of this process, and states by such numbers.
        self.next = 0
        self.states: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_KEPT)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Block:
        turn, at = divmod(i, self.batch)
        wanted = turn // self.world * self.batch + at
        if wanted < self.next:
            self._go_back(wanted)
        while True:
            if self.next % self.batch == 0:
                self.states.append((self.next, self._state()))
            tokens = self._make()
            if self.next > wanted:
                return block(tokens, self.begin)

    def save(self, folder: Path, batches: int) -> None:
        """Write the state after so many batches of this process into the folder of a checkpoint."""
        wanted = batches * self.batch
        state = self._state() if wanted == self.next else dict(self.states)[wanted]
        torch.save(_tensors({"state": state, "next": wanted, "world": self.world}), self._file(folder))

    def restore(self, folder: Path) -> None:
        """Go on from the state in the folder of a checkpoint."""
        file = self._file(folder)
        if not file.exists():
            got = len(list(folder.glob("data-*.pt")))
            rule = f"[train] a stream must go on with as many processes as it began with, {got}; got {self.world}"
            raise ThriftyError(f"{rule}; launch {got}, or train anew by --fresh")
        saved = _arrays(torch.load(file, weights_only=True))
        if saved["world"] != self.world:
            rule = f"[train] a stream must go on with as many processes as it began with, {saved['world']}"
            raise ThriftyError(f"{rule}; got {self.world}; launch {saved['world']}, or train anew by --fresh")
        self._load(saved["next"], saved["state"])

    def _make(self) -> np.ndarray:
        lane = min(int(np.searchsorted(self.edges, self.rng.random(), side="right")), len(self.lanes) - 1)
        self.next += 1
        return self.lanes[lane].block(self.length)

    def _state(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "lanes": [lane.state() for lane in self.lanes]}

    def _go_back(self, wanted: int) -> None:
        before = [(number, state) for number, state in self.states if number <= wanted]
        if not before:
            raise ThriftyError(f"[train] blocks of a stream come in order; got block {wanted} after {self.next - 1}")
        self._load(*before[-1])

    def _load(self, number: int, state: Mapping[str, Any]) -> None:
        self.next, self.rng.bit_generator.state = number, state["rng"]
        for lane, kept in zip(self.lanes, state["lanes"], strict=True):
            lane.restore(kept)
        self.states = deque((s for s in self.states if s[0] < number), _KEPT)

    def _file(self, folder: Path) -> Path:
        return folder / f"data-{self.rank}.pt"


def _tensors(value: Any) -> Any:
    """The same with tensors for arrays, which `torch.load` reads without running code."""
    return _mapped(value, np.ndarray, torch.from_numpy)


def _arrays(value: Any) -> Any:
    return _mapped(value, torch.Tensor, torch.Tensor.numpy)


def _mapped(value: Any, kind: type, change: Callable) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, kind, change) for key, entry in value.items()}
    return [_mapped(entry, kind, change) for entry in value] if isinstance(value, list) else value
