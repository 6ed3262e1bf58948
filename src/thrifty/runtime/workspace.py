"""Scratch arrays of a step."""

import numpy as np

from thrifty.checkpoint import DecoderConfig


class Workspace:
    """Buffers of a step of T positions; `rows` gives the same memory for fewer."""

    #: Residual stream [T, hidden].
    x: np.ndarray
    #: Queries, keys and values as one product gives them [T, q + 2 kv].
    qkv: np.ndarray
    #: Queries and keys with their positions [T, heads + kv_heads, 2, head_dim / 2], and scratch of that shape.
    turned: np.ndarray
    swapped: np.ndarray
    #: Output of attention [T, q].
    attended: np.ndarray
    #: Gate and up, or up alone [T, 2 inner or inner], and after the activation [T, inner].
    gate_up: np.ndarray
    inner: np.ndarray
    #: What a sub-layer adds to the residual stream [T, hidden].
    added: np.ndarray

    def __init__(self, config: DecoderConfig, T: int) -> None:
        heads = config.num_attention_heads + config.num_key_value_heads
        gates = 2 if config.feed_forward == "glu" else 1
        self.x = np.zeros((T, config.hidden_size), np.float32)
        self.qkv = np.zeros((T, config.q_size + 2 * config.kv_size), np.float32)
        self.turned = np.zeros((T, heads, 2, config.head_dim // 2), np.float32)
        self.swapped = np.zeros((T, heads, 2, config.head_dim // 2), np.float32)
        self.attended = np.zeros((T, config.q_size), np.float32)
        self.gate_up = np.zeros((T, gates * config.intermediate_size), np.float32)
        self.inner = np.zeros((T, config.intermediate_size), np.float32)
        self.added = np.zeros((T, config.hidden_size), np.float32)

    def rows(self, T: int) -> "Workspace":
        """The first T positions of every buffer."""
        part = object.__new__(Workspace)
        part.__dict__.update({name: array[:T] for name, array in self.__dict__.items()})
        return part
