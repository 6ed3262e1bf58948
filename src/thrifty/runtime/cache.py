"""Keys and values of the positions a sequence has been through."""

from typing import Any

import numpy as np

from thrifty import native
from thrifty.checkpoint import DecoderConfig


class Cache:
    """The tokens of one sequence; subclasses hold the keys and values of the first `len(cache)` positions."""

    #: How keys and values are stored: 'F32', 'F16' or 'I8'.
    dtype = "F32"
    #: What the cache was made by, and may be used with.
    owner: Any = None

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def keep_prefix(self, tokens: list[int]) -> int:
        """Drop what differs from `tokens`, and the last token too where all is shared: its logits are wanted."""
        shared = shared_prefix(self.tokens, tokens[:-1])
        del self.tokens[shared:]
        return shared

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """Copies of the first `count` positions: keys and values [layers, kv_heads, count, head_dim] as stored, and
        for 'I8' key_scales and value_scales float32 [layers, kv_heads, count]."""
        raise NotImplementedError

    def restore(self, tokens: list[int], arrays: dict[str, np.ndarray]) -> None:
        """Hold `tokens` alone, with their keys and values as `arrays` has them."""
        raise NotImplementedError


class NativeCache(Cache):
    """Keys and values in one piece of memory, laid out by the native library.

    Its pages are taken when they are first written, so a large capacity costs address space only.
    """

    def __init__(self, config: DecoderConfig, dtype: str, capacity: int) -> None:
        """dtype: 'F32', 'F16' or 'I8'."""
        super().__init__(capacity)
        padded = -(-capacity // native.CACHE_BLOCK) * native.CACHE_BLOCK
        self.dtype = dtype
        self._sizes = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self._memory = native.aligned_empty(native.cache_nbytes(dtype, *self._sizes, padded))
        #: Address and capacity, as a program wants them.
        self.place = self._memory.ctypes.data, padded

    @property
    def nbytes(self) -> int:
        """Bytes of the whole capacity."""
        return self._memory.nbytes

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """As `Cache.arrays`."""
        layers, kv_heads, head_dim = self._sizes
        shape = (layers, kv_heads, count, head_dim)
        arrays = {name: np.empty(shape, native.CACHE_STORAGE[self.dtype]) for name in ("keys", "values")}
        if self.dtype == "I8":
            arrays |= {name: np.empty(shape[:3], np.float32) for name in ("key_scales", "value_scales")}
        self._copy(arrays, into=False)
        return arrays

    def restore(self, tokens: list[int], arrays: dict[str, np.ndarray]) -> None:
        """As `Cache.restore`."""
        self._copy({name: np.require(array, requirements=["C", "A"]) for name, array in arrays.items()}, into=True)
        self.tokens = list(tokens)

    def _copy(self, arrays: dict[str, np.ndarray], into: bool) -> None:
        scales = (arrays["key_scales"], arrays["value_scales"]) if self.dtype == "I8" else None
        native.cache_copy(self.dtype, self.place, arrays["keys"], arrays["values"], scales, into)


class NumpyCache(Cache):
    """`keys[layer]` and `values[layer]` are float32 [kv_heads, capacity, head_dim]; pages are zero until written."""

    def __init__(self, config: DecoderConfig, capacity: int) -> None:
        super().__init__(capacity)
        shape = (config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
        self.values = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """As `Cache.arrays`."""
        return {
            "keys": np.stack([layer[:, :count] for layer in self.keys]),
            "values": np.stack([layer[:, :count] for layer in self.values]),
        }

    def restore(self, tokens: list[int], arrays: dict[str, np.ndarray]) -> None:
        """As `Cache.restore`."""
        for mine, stored in ((self.keys, arrays["keys"]), (self.values, arrays["values"])):
            for layer, part in zip(mine, stored, strict=True):
                layer[:, : len(tokens)] = part
        self.tokens = list(tokens)


def shared_prefix(first: list[int], second: list[int]) -> int:
    """Number of tokens that two sequences begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
