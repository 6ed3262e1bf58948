"""Scratch arrays of a step, with their addresses taken once."""

from dataclasses import dataclass

import numpy as np

from thrifty.checkpoint import DecoderConfig


@dataclass(frozen=True, eq=False)
class Buffer:
    """An array and its address: asking numpy for it costs as much as a small kernel."""

    array: np.ndarray
    address: int

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: type = np.float32) -> "Buffer":
        """Zeroed memory."""
        return cls.of(np.zeros(shape, dtype))

    @classmethod
    def of(cls, array: np.ndarray) -> "Buffer":
        """The array and where it lies."""
        return cls(array, array.ctypes.data)

    def rows(self, T: int) -> "Buffer":
        """The first T rows."""
        return Buffer(self.array[:T], self.address)


class Workspace:
    """Buffers of a step of T positions; `rows` gives the same memory for fewer."""

    #: Residual stream [T, hidden].
    x: Buffer
    #: Queries, keys and values as one product gives them [T, q + 2 kv].
    qkv: Buffer
    #: Queries and keys with their positions [T, heads + kv_heads, 2, head_dim / 2], and scratch of that shape.
    turned: Buffer
    swapped: Buffer
    #: Output of attention [T, q].
    attended: Buffer
    #: Gate and up, or up alone [T, 2 inner or inner], and after the activation [T, inner].
    gate_up: Buffer
    inner: Buffer
    #: What a sub-layer adds to the residual stream [T, hidden].
    added: Buffer
    #: Activation codes of a product, whatever its width, and their scales.
    codes: Buffer
    scales: Buffer

    def __init__(self, config: DecoderConfig, T: int, width: int) -> None:
        """width: the widest padded row of activation codes."""
        heads = config.num_attention_heads + config.num_key_value_heads
        gates = 2 if config.feed_forward == "glu" else 1
        self.x = Buffer.empty((T, config.hidden_size))
        self.qkv = Buffer.empty((T, config.q_size + 2 * config.kv_size))
        self.turned = Buffer.empty((T, heads, 2, config.head_dim // 2))
        self.swapped = Buffer.empty((T, heads, 2, config.head_dim // 2))
        self.attended = Buffer.empty((T, config.q_size))
        self.gate_up = Buffer.empty((T, gates * config.intermediate_size))
        self.inner = Buffer.empty((T, config.intermediate_size))
        self.added = Buffer.empty((T, config.hidden_size))
        self.codes = Buffer.empty((T, width), np.int8)
        self.scales = Buffer.empty((T,))

    def rows(self, T: int) -> "Workspace":
        """The first T positions of every buffer."""
        part = object.__new__(Workspace)
        part.__dict__.update({name: buffer.rows(T) for name, buffer in self.__dict__.items()})
        return part
