"""Tokens in, logits out: a decoder as one native call a step, or on numpy where there is no native library."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from thrifty import native
from thrifty.checkpoint import DecoderConfig, Folder
from thrifty.errors import ThriftyError
from thrifty.runtime.cache import NativeCache
from thrifty.runtime.fallback import NumpyDecoder
from thrifty.runtime.program import DecoderProgram, Options, fastest_format
from thrifty.runtime.states import Layout

#: Positions computed at a time when a prompt is read: memory does not grow with the prompt, and what passes between ops
#: stays in the last-level cache.
PREFILL_ROWS = 256
#: Positions whose logits are held at a time: a large vocabulary makes them the largest array.
HEAD_ROWS = 32

#: Storage of keys and values by the `cache_bits` of `load`.
CACHE_DTYPES = {32: "F32", 16: "F16", 8: "I8"}


class Decoder(Protocol):
    """What the runtime asks of a decoder; its caches are those of its own `new_cache`."""

    config: DecoderConfig
    max_context: int

    @property
    def bytes_per_token(self) -> int: ...

    @property
    def most_sequences(self) -> int: ...

    @property
    def most_rows(self) -> int: ...

    def new_cache(self, capacity: int) -> Any: ...

    def advance(self, tokens: Sequence[int], cache: Any) -> np.ndarray: ...

    def advance_batch(self, tokens: Sequence[int], caches: Sequence[Any]) -> np.ndarray: ...

    def logits(self, tokens: Sequence[int], cache: Any) -> Iterator[np.ndarray]: ...


class NativeDecoder:
    """y = head(norm(layers(embed(tokens)))) through `thrifty_run`; the buffers are shared, and a lock guards them."""

    def __init__(
        self,
        folder: Folder,
        weight_format: str,
        n_threads: int,
        max_context: int,
        head_bits: int | None,
        cache_bits: int,
    ) -> None:
        self.config = folder.config
        self.max_context = max_context
        self._layout = Layout(folder.config, CACHE_DTYPES[cache_bits])
        self._rows, self._outputs = PREFILL_ROWS, min(HEAD_ROWS, PREFILL_ROWS)
        options = Options(
            weight_format, head_bits, self._layout.dtype, n_threads, max_context, self._rows, self._outputs
        )
        if weight_format == "auto":
            chosen = "i2" if folder.config.linear == "dense" else fastest_format(folder, options)
            options = replace(options, weight_format=chosen)
        self.weight_format = options.weight_format
        self._decoder = DecoderProgram(folder, options)
        self._program = self._decoder.program
        self._lock = threading.Lock()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads."""
        return self._decoder.weight_bytes

    @property
    def most_sequences(self) -> int:
        """Sequences that one step of `advance_batch` takes."""
        return self._outputs

    @property
    def most_rows(self) -> int:
        """Positions whose logits one step gives and takes back: one where a state could not be taken back."""
        return 1 if self._layout.stateful else self._outputs

    def new_cache(self, capacity: int) -> NativeCache:
        """A cache of a sequence of up to `capacity` positions."""
        return NativeCache(self._layout, capacity)

    def advance(self, tokens: Sequence[int], cache: NativeCache) -> np.ndarray:
        """Run `tokens` after those in `cache`, and keep them there. Returns logits float32 [vocab] after the last."""
        with self._lock:
            for start in range(0, len(tokens), self._rows):
                part = tokens[start : start + self._rows]
                rows = self._fill([(part, cache)])
                last = start + len(part) == len(tokens)
                self._program.output_rows[0] = rows - 1
                self._program.run(rows, 1 if last else 0, [cache.place], end=None if last else self._decoder.head)
                cache.tokens.extend(part)
            return self._decoder.logits[0].copy()

    def advance_batch(self, tokens: Sequence[int], caches: Sequence[NativeCache]) -> np.ndarray:
        """One token more for each of several sequences, at most `most_sequences`, in one step: logits [n, vocab]."""
        if len(tokens) > self.most_sequences:
            raise ThriftyError(
                f"[decode] a step takes at most {self.most_sequences} sequences; got {len(tokens)}; give fewer"
            )
        with self._lock:
            rows = self._fill([([token], cache) for token, cache in zip(tokens, caches, strict=True)])
            self._program.output_rows[:rows] = np.arange(rows)
            self._program.run(rows, rows, [cache.place for cache in caches])
            for token, cache in zip(tokens, caches, strict=True):
                cache.tokens.append(token)
            return self._decoder.logits[:rows].copy()

    def logits(self, tokens: Sequence[int], cache: NativeCache) -> Iterator[np.ndarray]:
        """Like `advance`, with the logits after every token: float32 [HEAD_ROWS or fewer, vocab], in order."""
        for start in range(0, len(tokens), self._rows):
            with self._lock:
                parts = list(self._part_logits(tokens[start : start + self._rows], cache))
            yield from parts

    def _part_logits(self, tokens: Sequence[int], cache: NativeCache) -> Iterator[np.ndarray]:
        rows = self._fill([(tokens, cache)])
        if rows <= self._outputs:
            self._program.output_rows[:rows] = np.arange(rows)
            self._program.run(rows, rows, [cache.place])
            cache.tokens.extend(tokens)
            yield self._decoder.logits[:rows].copy()
            return
        self._program.run(rows, 0, [cache.place], end=self._decoder.head)
        cache.tokens.extend(tokens)
        for start in range(0, rows, self._outputs):
            count = min(self._outputs, rows - start)
            self._program.output_rows[:count] = np.arange(start, start + count)
            self._program.run(rows, count, [cache.place], begin=self._decoder.head)
            yield self._decoder.logits[:count].copy()

    def _fill(self, sequences: Sequence[tuple[Sequence[int], NativeCache]]) -> int:
        """Put the next tokens of some sequences into the batch. Returns the number of rows.

        The caller adds them to the caches once a step has computed them: one that was interrupted has not.
        """
        program, row = self._program, 0
        for slot, (tokens, cache) in enumerate(sequences):
            stop, first = row + len(tokens), len(cache)
            room = min(cache.capacity, self.max_context)
            if first + len(tokens) > room:
                raise ThriftyError(
                    f"[decode] tokens must fit the {room} positions of the cache; got {first + len(tokens)}; make a "
                    "larger one, or load with a larger max_context"
                )
            program.tokens[row:stop] = tokens
            program.positions[row:stop] = np.arange(first, first + len(tokens))
            program.slots[row:stop] = slot
            self._decoder.rope.reach(first + len(tokens))
            row = stop
        return row


def make_decoder(
    folder: Folder,
    weight_format: str,
    n_threads: int,
    max_context: int,
    head_bits: int | None = None,
    cache_bits: int = 32,
) -> Decoder:
    """The decoder of a folder; the options are those of `load`."""
    if native.available():
        return NativeDecoder(folder, weight_format, n_threads, max_context, head_bits, cache_bits)
    return NumpyDecoder(folder, max_context, head_bits)
