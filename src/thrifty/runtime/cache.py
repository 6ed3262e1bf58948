"""Keys and values of the positions a sequence has been through."""

import numpy as np

from thrifty.checkpoint import DecoderConfig


class Cache:
    """Preallocated keys and values of one sequence, and its tokens.

    `keys[layer]` and `values[layer]` are float32 [kv_heads, capacity, head_dim]; the first `len(cache)` positions hold.
    The pages are zero until written, so a large capacity costs address space only.
    """

    def __init__(self, config: DecoderConfig, capacity: int) -> None:
        shape = (config.num_key_value_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.keys = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
        self.values = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]
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
