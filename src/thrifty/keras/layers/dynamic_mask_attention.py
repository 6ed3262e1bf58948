"""Attention over the keys that score best, chosen exactly and attended to block by block."""

from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras.layers.core import PackedParts, RMSNorm, features, positive
from thrifty.keras.layers.embedding import RotaryPositionalEmbedding
from thrifty.keras.layers.linear import Linear, Projections

Selection = Literal["none", "keep_window", "ratio"]
SELECTIONS = ("none", "keep_window", "ratio")
#: What scores a key: each kv head, or each query head.
DT_HEADS = ("kv", "attention")

#: Queries of a block, where keys are evicted.
_QUERIES = 256
#: What stands in a logit for a key that is not seen.
_HIDDEN = -1e30


@keras.saving.register_keras_serializable(package="thrifty")
class DynamicMaskAttention(PackedParts, keras.layers.Layer):
    """y = o(norm(softmax(q k^T / sqrt(key_dim) + b) v)), causal, over the w keys whose b is greatest
    (Wonderful Matrices, arXiv 2412.11834; Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124).

    b = exp(A softplus(dt_proj v)) scores a key for every query, once per kv head, or per query head with
    dt_heads="attention", which then keeps keys of its own; A starts at 0, where every key is worth as much and the
    newest are kept. x: [B, T, d] -> [B, T, d]. num_kv_heads: as many as num_heads unless given. rope_theta turns q and
    k by their positions; qk_norm puts an RMSNorm with gain on each head of both before that, sub_norm one before `o`.

    selection: "keep_window" keeps the `window` best keys; "ratio" the int(ratio * max_positions) best; "none" all.
    dropout: of the weights. linear="ternary" makes q, k, v and o `DenseMML` layers; `dt_proj` is dense, in float32.
    A mask [B, T] is False at padding, which is not seen and takes no place among the kept, whatever side it is on; a
    query without any key gives zeros before `o`.

    Raises ThriftyError where heads do not divide and for a selection that keeps no key. Its pair is
    `thrifty.nn.DynamicMaskAttention`.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        num_kv_heads: int | None = None,
        *,
        window: int | None = None,
        selection: Selection = "keep_window",
        ratio: float = 0.0,
        max_positions: int | None = None,
        dt_heads: Literal["kv", "attention"] = "kv",
        qk_norm: bool = False,
        use_bias: bool = False,
        dropout: float = 0.0,
        sub_norm: bool = False,
        rope_theta: float | None = None,
        linear: Linear = "dense",
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(num_heads, kv_heads, key_dim, dt_heads, rope_theta)
        self.kept_keys = _kept_keys(selection, window, ratio, max_positions)
        self.num_heads, self.key_dim, self.num_kv_heads = num_heads, key_dim, kv_heads
        self.window, self.selection, self.ratio, self.max_positions = window, selection, ratio, max_positions
        self.dt_heads, self.qk_norm, self.sub_norm, self.rope_theta = dt_heads, qk_norm, sub_norm, rope_theta
        self.dropout = dropout
        self.projections = Projections(
            *("DynamicMaskAttention", linear, use_bias, kernel_initializer, bias_initializer),
            *(kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint),
        )
        policy = self.dtype_policy
        self.q_proj = self.projections.make(num_heads * key_dim, "q_proj", policy)
        self.k_proj = self.projections.make(kv_heads * key_dim, "k_proj", policy)
        self.v_proj = self.projections.make(kv_heads * key_dim, "v_proj", policy)
        self.score_heads = kv_heads if dt_heads == "kv" else num_heads
        # What ranks keys is not rounded to the dtype that the rest is computed in.
        self.dt_proj = self.projections.make(self.score_heads, "dt_proj", "float32", dense=True)
        self.q_norm, self.k_norm = (
            RMSNorm(name=name, dtype=policy) if qk_norm else None for name in ("q_norm", "k_norm")
        )
        self.rotary = None
        if rope_theta is not None:
            self.rotary = RotaryPositionalEmbedding(max_wavelength=rope_theta, name="rotary", dtype=policy)
        self.attn_sub_norm = RMSNorm(name="attn_sub_norm", dtype=policy) if sub_norm else None
        self.dropout_layer = keras.layers.Dropout(dropout, dtype=policy) if dropout else None
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        d, kv_width = features("DynamicMaskAttention", input_shape), self.num_kv_heads * self.key_dim
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.build(input_shape)
        self.dt_proj.build((*input_shape[:-1], kv_width))
        self.A = self.add_weight(
            name="A", shape=(self.score_heads,), initializer="zeros", dtype="float32", autocast=False
        )
        for norm, heads in ((self.q_norm, self.num_heads), (self.k_norm, self.num_kv_heads)):
            if norm is not None:
                norm.build((*input_shape[:-1], heads, self.key_dim))
        if self.rotary is not None:
            self.rotary.build((*input_shape[:-1], self.num_heads, self.key_dim))
        width = (*input_shape[:-1], self.num_heads * self.key_dim)
        if self.attn_sub_norm is not None:
            self.attn_sub_norm.build(width)
        self.o_proj = self.projections.make(d, "o_proj", self.dtype_policy)
        self.o_proj.build(width)

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        T = ops.shape(inputs)[1]
        q, k, v = (
            ops.reshape(project(inputs), (-1, T, heads, self.key_dim))
            for project, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        dt = self.dt_proj(ops.reshape(v, (-1, T, self.num_kv_heads * self.key_dim)))
        scores = ops.exp(ops.convert_to_tensor(self.A) * ops.softplus(dt))
        dropout = None
        if self.dropout_layer is not None:
            dropout = lambda p: self.dropout_layer(p, training=training)  # noqa: E731
        y = dynamic_mask_attention(q, k, v, scores, self.kept_keys, mask, dropout)
        y = ops.reshape(y, (-1, T, self.num_heads * self.key_dim))
        return self.o_proj(y if self.attn_sub_norm is None else self.attn_sub_norm(y))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        names = ("num_heads", "key_dim", "num_kv_heads", "window", "selection", "ratio", "max_positions", "dt_heads")
        names += ("qk_norm", "dropout", "sub_norm", "rope_theta")
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **own, **self.projections.get_config()}


def dynamic_mask_attention(
    q: Any,
    k: Any,
    v: Any,
    scores: Any,
    window: int | None = None,
    mask: Any = None,
    dropout: Callable[[Any], Any] | None = None,
) -> Any:
    """o_t = softmax(q_t K^T / sqrt(d) + b) V over the `window` best keys up to t (arXiv 2412.11834; 2508.02124).

    q: [B, T, heads, d]; k, v: [B, T, kv_heads, d]; scores b: [B, T, score_heads], score_heads kv_heads, or heads where
    each keeps keys of its own; mask: bool [B, T], False at padding, which is never seen and takes no place among the
    best. window=None keeps every key; of equal scores the newer is kept. A query without any key gives zeros. dropout
    is what the weights go through. Returns [B, T, heads, d] in the dtype of v.

    Where keys are evicted, each block of queries gathers the at most `window` keys that are left of those before it,
    so that memory is linear in T. Gradients flow to q, k, v and scores.
    """
    heads, h, d = q.shape[2], scores.shape[2], q.shape[3]
    k, v = (t if t.shape[2] == h else ops.repeat(t, h // t.shape[2], axis=2) for t in (k, v))
    T = ops.shape(q)[1]  # a tensor where the length is not known yet
    known = isinstance(T, int)
    window = None if window is None or (known and window >= T) else window
    whole = window is None or (known and T <= _QUERIES)
    n, size = (1, T) if whole else ((T + _QUERIES - 1) // _QUERIES, _QUERIES)
    scores = ops.cast(scores, "float32")
    ranks, order = _ranks(scores, mask, window)
    # The heads that share keys are rows of one product: [B, h, n, size * heads / h, d].
    queries = _blocks(ops.reshape(q * d**-0.5, (-1, T, h, heads // h * d)), n, size)
    queries = ops.reshape(queries, (-1, h, n, size * (heads // h), d))
    keys, values, b, new = (_blocks(t, n, size) for t in (k, v, scores, ranks))  # [B, h, n, size, ...]
    old = None
    if not whole:
        old = _survivors(new, window)
        rows = _rows(old, order)
        gathered = (ops.take(ops.reshape(t, (-1, *t.shape[3:])), rows, axis=0) for t in (k, v, scores))
        keys, values, b = (ops.concatenate(pair, axis=3) for pair in zip(gathered, (keys, values, b), strict=True))
    seen = _seen(old, new, window)  # [B, h, n, size, U]
    logits = ops.cast(ops.matmul(queries, ops.swapaxes(keys, -1, -2)), "float32")
    shape, by_head = ops.shape(logits), (-1, h, n, size, heads // h, ops.shape(b)[-1])
    logits = ops.where(seen[..., None, :], ops.reshape(logits, by_head) + b[..., None, None, :], _HIDDEN)
    p = ops.softmax(ops.reshape(logits, shape), axis=-1)
    if dropout is not None:
        p = dropout(p)
    y = ops.matmul(ops.cast(p, values.dtype), values)
    y = ops.transpose(ops.reshape(y, (-1, h, n * size, heads // h * d)), (0, 2, 1, 3))
    y = ops.reshape(y[:, :T], (-1, T, heads, d))
    return y if mask is None else ops.where(ops.cumsum(ops.cast(mask, "int32"), axis=1)[..., None, None] > 0, y, 0)


def _ranks(scores: Any, mask: Any, window: int | None) -> tuple[Any, Any]:
    """Ranks of keys in their sequence and head, 1 for the worst and 0 for padding, and positions in their order.

    scores: [B, T, h]; both int32 [B, T, h]. Ranks do not tie, so that what chooses by them chooses alike everywhere.
    """
    scores = ops.stop_gradient(scores)
    if mask is not None:
        scores = ops.where(mask[..., None], scores, -float("inf"))
    # Stable: of equal scores the newer has the greater rank.
    order = ops.argsort(scores, axis=1)
    ranks = ops.argsort(order, axis=1) + 1
    return ranks if mask is None else ops.where(mask[..., None], ranks, 0), order


def _blocks(x: Any, n: Any, size: Any) -> Any:
    """x [B, T, h, ...] in blocks [B, h, n, size, ...], with zeros after its end."""
    T, rest = ops.shape(x)[1], x.shape[2:]
    if not isinstance(n, int) or n * size != T:
        x = ops.pad(x, [(0, 0), (0, n * size - T), *((0, 0) for _ in rest)])
    x = ops.reshape(x, (-1, n, size, *rest))
    return ops.transpose(x, (0, 3, 1, 2, *range(4, len(rest) + 3)))


def _survivors(ranks: Any, window: int) -> Any:
    """The ranks [B, h, n, window] of the keys that are kept where a block begins, best first, 0 where there are fewer.

    ranks: [B, h, n, size].
    """
    B, h = ops.shape(ranks)[:2]

    def step(kept, new):
        return ops.top_k(ops.concatenate([kept, new], axis=-1), window)[0], kept

    none = ops.zeros((B, h, window), dtype="int32")
    _, kept = ops.scan(step, none, ops.moveaxis(ranks, 2, 0))
    return ops.moveaxis(kept, 0, 2)


def _rows(ranks: Any, order: Any) -> Any:
    """Where the keys of ranks [B, h, n, W] are among all of order [B, T, h], laid end to end."""
    B, T, h = ops.shape(order)
    places = ops.reshape(ops.maximum(ranks - 1, 0), (B, h, -1))
    positions = ops.take_along_axis(ops.transpose(order, (0, 2, 1)), places, axis=-1)
    rows = (ops.arange(B, dtype="int32")[:, None, None] * T + positions) * h + ops.arange(h, dtype="int32")[:, None]
    return ops.reshape(rows, ops.shape(ranks))


def _seen(old: Any, new: Any, window: int | None) -> Any:
    """Which keys, of those left and the block's own, a query sees: fewer than `window` better ones up to it.

    old: ranks [B, h, n, W], best first, or None; new: ranks [B, h, n, size]. Returns bool [B, h, n, size, W + size].
    """
    size = ops.shape(new)[-1]
    places = ops.arange(size, dtype="int32")
    own = ops.logical_and(places <= places[:, None], new[..., None, :] > 0)
    if window is None:
        return own
    earlier = ops.tril(ops.ones((size, size)))
    # Counts are sums of ones: exact, and fastest as a product.
    better = ops.matmul(earlier, _greater(new, new))
    if old is None:
        return ops.logical_and(own, better < window)
    # A block pushes out as many keys as it has, at most: the best of those left stay, whatever it brings.
    stay = max(0, window - size)
    left, better = old[..., stay:], better + stay
    better = better + ops.sum(_greater(old[..., stay:], new), axis=-2)[..., None, :]
    pushed = ops.matmul(earlier, _greater(new, left)) + ops.arange(stay, window, dtype="float32")
    parts = [pushed < window, ops.logical_and(own, better < window)]
    seen = ops.concatenate([ops.logical_and(left[..., None, :] > 0, parts[0]), parts[1]], axis=-1)
    if not stay:
        return seen
    certain = old[..., None, :stay] > 0
    return ops.concatenate([ops.repeat(certain, size, axis=-2), seen], axis=-1)


def _greater(x: Any, y: Any) -> Any:
    return ops.cast(x[..., :, None] > y[..., None, :], "float32")


def _check_heads(num_heads: int, kv_heads: int, key_dim: int, dt_heads: str, rope_theta: float | None) -> None:
    layer = "[DynamicMaskAttention]"
    for name, value in (("num_heads", num_heads), ("num_kv_heads", kv_heads), ("key_dim", key_dim)):
        positive("DynamicMaskAttention", name, value)
    if num_heads % kv_heads:
        raise ThriftyError(
            f"{layer} num_heads must be a multiple of num_kv_heads; got {num_heads} and {kv_heads}; change either"
        )
    if dt_heads not in DT_HEADS:
        raise ThriftyError(f"{layer} dt_heads must be one of {', '.join(DT_HEADS)}; got {dt_heads!r}")
    if rope_theta is not None and key_dim % 2:
        raise ThriftyError(f"{layer} key_dim must be even for rotary positions; got {key_dim}; take {key_dim + 1}")


def _kept_keys(selection: str, window: int | None, ratio: float, max_positions: int | None) -> int | None:
    """w, the keys that a head keeps; None: all."""
    layer = "[DynamicMaskAttention]"
    if selection not in SELECTIONS:
        raise ThriftyError(f"{layer} selection must be one of {', '.join(SELECTIONS)}; got {selection!r}")
    if selection == "none":
        return None
    if selection == "keep_window":
        if isinstance(window, bool) or not isinstance(window, int | np.integer) or window < 1:
            raise ThriftyError(
                f"{layer} window must be an integer of at least 1; got {window!r}; selection='none' keeps every key"
            )
        return int(window)
    kept = int(ratio * (max_positions or 0))
    if not 0 < ratio <= 1 or kept < 1:
        raise ThriftyError(
            f"{layer} ratio must be in (0, 1] and keep one key of max_positions; got {ratio} of {max_positions}; "
            "selection='none' keeps every key"
        )
    return kept
