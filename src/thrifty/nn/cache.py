"""Layers of transformers' `Cache(layers=[...])` for what grows with no text: states of fixed size."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from thrifty.errors import ThriftyError


class RecurrentLayer(CacheLayerMixin):
    """The state of a recurrence after the tokens seen so far: one tensor [B, ...], as large after a million tokens.

    A mixer reads `state` (None before the first token) and writes it back by `keep`. Rows can be reordered, repeated
    and selected, as beams need it. Raises ThriftyError where tokens are to be taken back, or where it is used as a
    cache of keys.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.seen = 0

    def keep(self, state: Tensor, tokens: int) -> None:
        """The state after so many more tokens."""
        self.state = state
        self.seen += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make: a state comes whole."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ThriftyError("[cache] a recurrent layer holds a state; got keys and values; give the mixer its own layer")

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        self._map(lambda state: state.to("cpu"))

    def prefetch(self) -> None:
        """Nothing to do: the recurrence moves its state to where it computes."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state.index_select(0, indices.to(state.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ThriftyError(
                "[cache] a recurrent state cannot give tokens back; got crop("
                f"{tokens_to_remove}); generate without an assistant, or start from an empty cache"
            )

    def _map(self, change: Any) -> None:
        if self.state is not None:
            self.state = change(self.state)


def recurrent_layer(cache: Any, layer_idx: int) -> RecurrentLayer | None:
    """The layer of a transformers `Cache` that holds a recurrent mixer's state; None without a cache.

    Raises ThriftyError where that layer is made for something else.
    """
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, RecurrentLayer):
        found = "nothing" if layer is None else type(layer).__name__
        raise ThriftyError(
            f"[cache] layer {layer_idx} is recurrent and needs a RecurrentLayer; got {found}; let the model make its "
            "cache, or give Cache(layers=[...]) with one"
        )
    return layer


def unpadded(mask: Tensor | None, tokens: int) -> Tensor | None:
    """The last columns, one a token, of a padding mask [B, S] that is False at padding; None for no padding."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] < tokens:
        raise ThriftyError(
            f"[mixer] a padding mask must be boolean [B, S] with S >= {tokens}; got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask[:, -tokens:]
