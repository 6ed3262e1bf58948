"""Keys and values of the positions a sequence has been through."""

import numpy as np

from thrifty import native
from thrifty.checkpoint import DecoderConfig


class Cache:
    """The tokens of one sequence; subclasses hold the keys and values of the first `len(cache)` positions."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def keep_prefix(self, tokens: list[int]) -> int:
        """Drop what differs from `tokens`, and the last token too where all is shared: its logits are wanted."""
        shared = 0
        for mine, other in zip(self.tokens, tokens[:-1], strict=False):
            if mine != other:
                break
            shared += 1
        del self.tokens[shared:]
        return shared


class NativeCache(Cache):
    """Keys and values in one piece of memory, laid out by the native library.

    Its pages are taken when they are first written, so a large capacity costs address space only.
    """

    def __init__(self, config: DecoderConfig, dtype: str, capacity: int) -> None:
        """dtype: 'F32', 'F16' or 'I8'."""
        super().__init__(capacity)
        padded = -(-capacity // native.CACHE_BLOCK) * native.CACHE_BLOCK
        sizes = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self._memory = native.aligned_empty(native.cache_nbytes(dtype, *sizes, padded))
        #: Address and capacity, as a program wants them.
        self.place = self._memory.ctypes.data, padded

    @property
    def nbytes(self) -> int:
        """Bytes of the whole capacity."""
        return self._memory.nbytes


class NumpyCache(Cache):
    """`keys[layer]` and `values[layer]` are float32 [kv_heads, capacity, head_dim]; pages are zero until written."""

    def __init__(self, config: DecoderConfig, capacity: int) -> None:
        super().__init__(capacity)
        shape = (config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
        self.values = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
