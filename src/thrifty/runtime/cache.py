"""What the layers keep of the positions a sequence has been through."""

from typing import Any

import numpy as np

from thrifty import native
from thrifty.checkpoint import DecoderConfig
from thrifty.runtime.states import Layout

#: What plain arrays are, by dtypes as safetensors has them.
_STORAGE = {**native.CACHE_STORAGE, "I32": np.int32}


class Cache:
    """The tokens of one sequence; subclasses hold what the layers need of the first `len(cache)` positions."""

    #: What the cache was made by, and may be used with.
    owner: Any = None

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self.tokens: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def keep_prefix(self, tokens: list[int]) -> int:
        """Drop what differs from `tokens`, and the last token too where all is shared: its logits are wanted.

        A state cannot be taken back: where it is of other tokens, or of all of them, everything is dropped.
        """
        shared = usable_prefix(self.layout, self.tokens, tokens[:-1])
        del self.tokens[shared:]
        return shared

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """Copies of the first `count` positions, as `Layout.arrays` has them; with states, of all positions only."""
        raise NotImplementedError

    def restore(self, tokens: list[int], arrays: dict[str, np.ndarray]) -> None:
        """Hold `tokens` alone, with what `arrays` has of them."""
        raise NotImplementedError

    def shapes(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtypes, as safetensors has them, and shapes of `arrays(count)`."""
        raise NotImplementedError


class NativeCache(Cache):
    """Keys and values, and states, each in one piece of memory, laid out by the native library.

    Its pages are taken when they are first written, so a large capacity costs address space only.
    """

    def __init__(self, layout: Layout, capacity: int) -> None:
        super().__init__(layout, capacity)
        padded = -(-capacity // native.CACHE_BLOCK) * native.CACHE_BLOCK
        self._padded = padded
        self._memory = native.aligned_empty(layout.keys_nbytes(padded))
        self._states = native.aligned_empty(layout.states_nbytes(padded))
        #: Addresses and capacity, as a program wants them.
        self.place = self._memory.ctypes.data, padded, self._states.ctypes.data

    @property
    def nbytes(self) -> int:
        """Bytes of the whole capacity."""
        return self._memory.nbytes + self._states.nbytes

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """As `Cache.arrays`."""
        arrays = {name: np.empty(shape, _STORAGE[dtype]) for name, (dtype, shape) in self.layout.arrays(count).items()}
        self._copy(arrays, into=False)
        return arrays

    def shapes(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As `Cache.shapes`."""
        return self.layout.arrays(count)

    def restore(self, tokens: list[int], arrays: dict[str, np.ndarray]) -> None:
        """As `Cache.restore`."""
        self._copy({name: np.require(array, requirements=["C", "A"]) for name, array in arrays.items()}, into=True)
        self.tokens = list(tokens)

    def _copy(self, arrays: dict[str, np.ndarray], into: bool) -> None:
        def move(mine: np.ndarray, plain: np.ndarray) -> None:
            mine, plain = (mine, plain) if into else (plain, mine)
            mine[...] = plain

        if "keys" in arrays:
            self._copy_keys(self.place, arrays, "", slice(None), into)
        if "states" in arrays:
            move(self._states[: self.layout.recurrent_nbytes].view(np.float32), arrays["states"])
        for i in range(self.layout.count("dynamic_mask")):
            nbytes, heads, slots = (
                self.layout.mask_nbytes(self._padded),
                self.layout.config.score_heads,
                self.layout.slots(self._padded),
            )
            end = self.layout.recurrent_nbytes + (i + 1) * nbytes
            place = self._states.ctypes.data + end - nbytes, slots
            self._copy_keys(place, arrays, "mask_", slice(i, i + 1), into)
            marks = self._states[end - 8 * heads * slots : end]
            kept = arrays["mask_scores"].shape[2]
            move(marks.view(np.float32).reshape(2, heads, slots)[0, :, :kept], arrays["mask_scores"][i])
            move(marks.view(np.int32).reshape(2, heads, slots)[1, :, :kept], arrays["mask_positions"][i])

    def _copy_keys(
        self, place: native.Place, arrays: dict[str, np.ndarray], prefix: str, layers: slice, into: bool
    ) -> None:
        keys, values = arrays[f"{prefix}keys"][layers], arrays[f"{prefix}values"][layers]
        scales = None
        if self.layout.dtype == "I8":
            scales = arrays[f"{prefix}key_scales"][layers], arrays[f"{prefix}value_scales"][layers]
        native.cache_copy(self.layout.dtype, place, keys, values, scales, into)


class NumpyCache(Cache):
    """`keys[layer]` and `values[layer]` are float32 [kv_heads, capacity, head_dim], of a dynamic mask too, with its
    `scores[layer]` [capacity, score_heads]; `states[layer]` are those of recurrences. Pages are zero until written."""

    def __init__(self, config: DecoderConfig, capacity: int) -> None:
        super().__init__(Layout(config, "F32"), capacity)
        shape = (config.num_key_value_heads, capacity, config.head_dim)
        mixers = [config.mixer(i) for i in range(config.num_hidden_layers)]
        keyed = [i for i, mixer in enumerate(mixers) if mixer in ("attention", "dynamic_mask")]
        self.keys = {i: np.zeros(shape, np.float32) for i in keyed}
        self.values = {i: np.zeros(shape, np.float32) for i in keyed}
        self.scores = {
            i: np.zeros((capacity, config.score_heads), np.float32) for i in keyed if mixers[i] == "dynamic_mask"
        }
        shapes = {
            "mlgru": (config.hidden_size,),
            "hgrn": (config.hidden_size,),
            "ssd": (config.num_attention_heads, config.head_dim, config.head_dim),
        }
        self.states = {i: np.zeros(shapes[mixer], np.float32) for i, mixer in enumerate(mixers) if mixer in shapes}

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """As `Cache.arrays`; here a dynamic mask has the keys of all positions, beside those of attention."""
        parts = {"keys": self.keys, "values": self.values}
        arrays = {name: np.stack([a[:, :count] for a in part.values()]) for name, part in parts.items() if part}
        arrays |= {f"scores.{i}": scores[:count].copy() for i, scores in self.scores.items()}
        return arrays | {f"states.{i}": state.copy() for i, state in self.states.items()}

    def shapes(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As `Cache.shapes`."""
        keys = [(len(part), *next(iter(part.values())).shape) for part in (self.keys, self.values) if part]
        found = {name: (n, heads, count, d) for name, (n, heads, _, d) in zip(("keys", "values"), keys, strict=False)}
        found |= {f"scores.{i}": (count, scores.shape[1]) for i, scores in self.scores.items()}
        found |= {f"states.{i}": state.shape for i, state in self.states.items()}
        return {name: ("F32", shape) for name, shape in found.items()}

    def restore(self, tokens: list[int], arrays: dict[str, np.ndarray]) -> None:
        """As `Cache.restore`."""
        for part, name in ((self.keys, "keys"), (self.values, "values")):
            for mine, stored in zip(part.values(), arrays.get(name, ()), strict=True):
                mine[:, : len(tokens)] = stored
        for i, scores in self.scores.items():
            scores[: len(tokens)] = arrays[f"scores.{i}"]
        for i, state in self.states.items():
            state[:] = arrays[f"states.{i}"]
        self.tokens = list(tokens)


def usable_prefix(layout: Layout, held: list[int], wanted: list[int]) -> int:
    """Tokens of a cache that holds `held` with which `wanted` can go on: with states, all of them or none."""
    shared = shared_prefix(held, wanted)
    return 0 if layout.stateful and shared < len(held) else shared


def shared_prefix(first: list[int], second: list[int]) -> int:
    """Number of tokens that two sequences begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
