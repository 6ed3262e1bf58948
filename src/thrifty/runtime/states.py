"""Where a sequence keeps what its layers need of the past: keys and values by position, and states."""

from dataclasses import dataclass

from thrifty import native
from thrifty.checkpoint import DecoderConfig

_LINE = 64


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Bytes of a sequence. Its states are those of recurrences, one after another, then the slots of dynamic masks."""

    config: DecoderConfig
    #: How keys and values are stored: 'F32', 'F16' or 'I8'.
    dtype: str

    def number(self, layer: int) -> int:
        """The number of a layer among those with its mixer."""
        return sum(self.config.mixer(i) == self.config.mixer(layer) for i in range(layer))

    def count(self, mixer: str) -> int:
        """Layers with that mixer."""
        return sum(self.config.mixer(i) == mixer for i in range(self.config.num_hidden_layers))

    @property
    def stateful(self) -> bool:
        """Whether a sequence cannot be taken back to fewer tokens: some layer keeps no key of each."""
        return self.count("attention") < self.config.num_hidden_layers

    def at(self, layer: int) -> int:
        """Where the state of a recurrence begins, or the slots of the first dynamic mask."""
        if self.config.mixer(layer) == "dynamic_mask":
            layer = self.config.num_hidden_layers
        return sum(self._recurrent_nbytes(self.config.mixer(i)) for i in range(layer))

    @property
    def recurrent_nbytes(self) -> int:
        """Bytes of the states of all recurrences."""
        return sum(self._recurrent_nbytes(self.config.mixer(i)) for i in range(self.config.num_hidden_layers))

    def _recurrent_nbytes(self, mixer: str) -> int:
        c = self.config
        floats = {
            "mlgru": c.hidden_size,
            "hgrn": c.hidden_size,
            "ssd": c.num_attention_heads * c.head_dim * _padded(c.head_dim, 16),
        }
        return _padded(4 * floats.get(mixer, 0), _LINE)

    def kept(self, positions: int) -> int:
        """Keys that a dynamic mask keeps of so many."""
        return positions if self.config.window is None else min(self.config.window, positions)

    def slots(self, capacity: int) -> int:
        """Slots of a score head in a cache of `capacity` positions."""
        return _padded(self.kept(capacity), native.CACHE_BLOCK)

    def mask_nbytes(self, capacity: int) -> int:
        """Bytes of one dynamic mask: keys and values, then a score and a position for each slot."""
        c, slots = self.config, self.slots(capacity)
        return native.cache_nbytes(self.dtype, 1, c.score_heads, c.head_dim, slots) + 8 * c.score_heads * slots

    def keys_nbytes(self, capacity: int) -> int:
        """Bytes of the keys and values of all layers of attention."""
        c = self.config
        return native.cache_nbytes(
            self.dtype,
            self.count("attention"),
            c.num_key_value_heads,
            c.head_dim,
            _padded(capacity, native.CACHE_BLOCK),
        )

    def states_nbytes(self, capacity: int) -> int:
        """Bytes of all states."""
        masks = self.count("dynamic_mask")
        return self.recurrent_nbytes + (masks * self.mask_nbytes(capacity) if masks else 0)

    def arrays(self, positions: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtypes (as safetensors has them) and shapes of the plain arrays that hold the first `positions`."""
        c, found = self.config, {}
        attention, masks = self.count("attention"), self.count("dynamic_mask")
        kept = (masks, c.score_heads, self.kept(positions))
        for prefix, count, shape in (
            ("", attention, (attention, c.num_key_value_heads, positions)),
            ("mask_", masks, kept),
        ):
            if not count:
                continue
            found |= dict.fromkeys((f"{prefix}keys", f"{prefix}values"), (self.dtype, (*shape, c.head_dim)))
            if self.dtype == "I8":
                found |= dict.fromkeys((f"{prefix}key_scales", f"{prefix}value_scales"), ("F32", shape))
        if masks:
            found |= {"mask_scores": ("F32", kept), "mask_positions": ("I32", kept)}
        if self.recurrent_nbytes:
            found["states"] = ("F32", (self.recurrent_nbytes // 4,))
        return found
