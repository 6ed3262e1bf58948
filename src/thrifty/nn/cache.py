"""Layers of transformers' `Cache(layers=[...])` for what grows with no text: the keys worth keeping, and states."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from thrifty import ops
from thrifty.errors import ThriftyError


class BoundedLayer(CacheLayerMixin):
    """What is kept of `seen` tokens without keeping them all. Rows can be reordered, repeated and selected, as beams
    need it. Subclasses hold the tensors, and say how all of them are changed and forgotten.

    Raises ThriftyError where tokens are to be taken back, or where it is used as a cache of keys.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    #: The rule that keys and values alone, and a crop, break.
    needs: str
    cannot: str

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor, where there is one, by what `change` makes of it."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make: tensors come with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ThriftyError(f"[cache] {self.needs}; got keys and values; give the mixer its own layer")

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen, self.is_initialized = 0, False

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu"))

    def prefetch(self) -> None:
        """Nothing to do: the mixer moves the tensors to where it computes."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ThriftyError(
                f"[cache] {self.cannot}; got crop({tokens_to_remove}); generate without an assistant, or start from an "
                "empty cache"
            )


class RecurrentLayer(BoundedLayer):
    """The state of a recurrence after the tokens seen so far: one tensor [B, ...], as large after a million tokens.

    A mixer reads `state` (None before the first token) and writes it back by `keep`.
    """

    needs = "a recurrent layer holds a state"
    cannot = "a recurrent state cannot give tokens back"

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None

    def keep(self, state: Tensor, tokens: int) -> None:
        """The state after so many more tokens."""
        self.state = state
        self.seen += tokens
        self.is_initialized = True

    def reset(self) -> None:
        super().reset()
        self.state = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = change(self.state)


class DynamicMaskLayer(BoundedLayer):
    """The keys, values and scores that dynamic mask attention can still see: `window` slots per score head.

    A mixer calls `extend`. An evicted key never returns, so what is left out is never missed, and bytes and work of a
    step do not depend on how many tokens came before.
    """

    needs = "a dynamic mask layer needs scores too"
    cannot = "keys that a dynamic mask evicted cannot be brought back"

    def __init__(self) -> None:
        super().__init__()
        #: keys, values [B, score_heads, slots, d]; scores, ages [B, score_heads, slots]; an age is a position.
        self.slots: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor, scores: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and scores that the queries of T new tokens choose among, these last; keeps the `window` best.

        k, v: [B, kv_heads, T, d]; scores: [B, score_heads, T], -inf at padding; window=None keeps all. Of a single
        token the choice is made: at most `window` keys come back, in the order of their slots, the new one perhaps not
        among them.
        """
        if scores.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(scores.shape[1] // t.shape[1], dim=1) for t in (k, v))
        T = scores.shape[2]
        new: Any
        ages = torch.arange(self.seen, self.seen + T, device=scores.device).expand(scores.shape)
        new = k, v, scores, ages
        self._map(lambda slots: slots.to(scores.device))
        self.seen += T
        self.is_initialized = True
        if self.slots is not None and T == 1 and self.slots[2].shape[2] == window:
            self.slots = slots = _replace_worst(self.slots, new)
            return slots[:3]
        if self.slots is not None:
            old = self.slots if T == 1 else _select(self.slots, self.slots[3].argsort(-1))
            new = tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))
        S = new[2].shape[2]
        if window is None or window >= S:
            self.slots = tuple(t.clone() for t in new) if self.slots is None else new
        else:
            self.slots = _select(new, _slots(ops.kept_until(new[2], window), window))
        return new[:3]

    def reset(self) -> None:
        super().reset()
        self.slots = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.slots is not None:
            keys, values, scores, ages = self.slots
            self.slots = change(keys), change(values), change(scores), change(ages)


def recurrent_layer(cache: Any, layer_idx: int) -> RecurrentLayer | None:
    """The layer of a transformers `Cache` that holds a recurrent mixer's state; None without a cache.

    Raises ThriftyError where that layer is made for something else.
    """
    return _layer(cache, layer_idx, RecurrentLayer, "recurrent")


def dynamic_mask_layer(cache: Any, layer_idx: int) -> DynamicMaskLayer | None:
    """The layer of a transformers `Cache` that holds a dynamic mask's keys; None without a cache.

    Raises ThriftyError where that layer is made for something else.
    """
    return _layer(cache, layer_idx, DynamicMaskLayer, "a dynamic mask")


def _layer(cache: Any, layer_idx: int, kind: type, name: str) -> Any:
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, kind):
        found = "nothing" if layer is None else type(layer).__name__
        raise ThriftyError(
            f"[cache] layer {layer_idx} is {name} and needs a {kind.__name__}; got {found}; let the model make its "
            "cache, or give Cache(layers=[...]) with one"
        )
    return layer


def unpadded(mask: Tensor | None, tokens: int) -> Tensor | None:
    """The last columns, one a token, of a padding mask [B, S] that is False at padding; None for no padding."""
    if mask is None or mask.dtype == torch.int64:
        return None
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] < tokens:
        raise ThriftyError(
            f"[mixer] a padding mask must be boolean [B, S] with S >= {tokens}; got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask[:, -tokens:]


def packed(mask: Tensor | None, cache: Any) -> Tensor | None:
    """The documents [B, T] that an integer mask numbers; None for a boolean one or none.

    Raises ThriftyError with a cache: what it holds belongs to one document a row.
    """
    if mask is None or mask.dtype != torch.int64:
        return None
    if cache is not None:
        raise ThriftyError(
            "[mixer] documents packed in one row cannot be cached; got a cache; leave it out, or give each a row"
        )
    return mask


def _select(slots: tuple[Tensor, ...], index: Tensor) -> Any:
    """Entries of keys and values [B, h, n, d], scores and ages [B, h, n] at index [B, h, m]."""
    return tuple(t.gather(2, index if t.ndim == 3 else index[..., None].expand(-1, -1, -1, t.shape[3])) for t in slots)


def _slots(ends: Tensor, window: int) -> Tensor:
    """The keys [B, h, window] that are left in the order that steps keep them in: a key takes the slot of the one that
    it evicts. ends: `thrifty.ops.kept_until` of S keys, [B, h, S]."""
    S = ends.shape[-1]
    positions = torch.arange(S, device=ends.device).expand(ends.shape)
    evicted = torch.cat([positions, positions[..., :1]], -1).scatter(-1, ends, positions)[..., :S]
    slots = torch.where(positions < window, positions, evicted)
    for _ in range(S.bit_length()):  # from a key to the one before it, then to that of twice as long ago
        slots = slots.gather(-1, slots)
    return slots.masked_fill(ends < S, S).argsort(-1)[..., :window]


def _replace_worst(slots: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Any:
    """Full slots, where one new key takes the place of the worst, the oldest of equals, unless it is worse itself."""
    # In place, but where a backward pass will want the slots as they were.
    write = Tensor.scatter if any(t.requires_grad for t in (*slots, *new)) else Tensor.scatter_
    scores, ages = slots[2:]
    lowest = scores.amin(-1, keepdim=True)
    worst = torch.where(scores == lowest, ages, torch.iinfo(ages.dtype).max).argmin(-1, keepdim=True)  # [B, h, 1]
    better = new[2] >= lowest
    written = []
    for kept, old, fresh in zip(slots, _select(slots, worst), new, strict=True):
        shape = (*worst.shape, 1)[: kept.ndim]
        value = torch.where(better.view(shape), fresh, old)
        written.append(write(kept, 2, worst.view(shape).expand(fresh.shape), value))
    return tuple(written)
