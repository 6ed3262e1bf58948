"""Attention that keeps its keys and values from call to call."""

from typing import Any

import keras
import numpy as np
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras.layers.core import plain


@keras.saving.register_keras_serializable(package="thrifty")
class CachedMultiHeadAttention(keras.layers.MultiHeadAttention):
    """o = softmax(q k^T / sqrt(key_dim)) v per head, over the keys of this call and of earlier ones (arXiv 1706.03762).

    Arguments and variables are those of `keras.layers.MultiHeadAttention`. With num_kv_heads, a divisor of num_heads,
    query head h reads key head h // (num_heads / num_kv_heads) (arXiv 2305.13245), and the cache is as much smaller.

    call: query [B, T, dim], value and key [B, L, dim] -> (output, cache), or (output, scores [B, num_heads, T, S],
    cache) with return_attention_scores. Attention is causal, with a cache and without, unless use_causal_mask=False.
    attention_mask, [T, S], [B, T, S] or [B, num_heads, T, S], restricts it further; S counts the keys attended to.

    - cache=None: the keys are those of `value`, S = L, and the cache returned is None. Keras masks are respected.
    - cache and step: the L keys and values overwrite slots step ... step + L - 1; query t is at position step + t. What
      is in slots from step + L on changes nothing; those before step count as written. S is the length of the
      cache. L = 1 decodes, L > 1 takes in a prompt.
    - cache and no step: keys and values are appended. Every slot of the cache given counts as written, and the one
      returned is longer by L, its length is S.

    `create_cache(batch, length)` makes an empty cache. step is an integer, or an integer tensor without axes, which may
    be traced: one compiled call serves all steps. An integer that leads out of the cache raises ThriftyError; the value
    of a tensor is not looked at (JAX and TensorFlow then move the chunk to the end of the cache, torch fails).

    ThriftyError too: a cache of another shape; a cache while training (what is cached passes no gradients on); a Keras
    mask of `value` or `key` beside a cache, unless attention_mask says instead what to see (a cache does not remember
    masks); a cache or num_kv_heads with other than three axes, or with use_gate; a cache with value_dim other than
    key_dim.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: Any = None,
        attention_axes: Any = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        num_kv_heads: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads,
            key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
            raise _error(f"num_kv_heads must divide num_heads={num_heads}; got {num_kv_heads}; choose a divisor")
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._window = kwargs.get("sliding_window")
        self._gated = bool(kwargs.get("use_gate"))

    def build(self, query_shape, value_shape, key_shape=None) -> None:
        if self.num_kv_heads == self.num_heads:
            super().build(query_shape, value_shape, key_shape)
        else:
            self._build_grouped(query_shape, value_shape, key_shape or value_shape)
        for projection in (self.query_dense, self.key_dense, self.value_dense, self.output_dense):
            projection.supports_masking = True

    def _build_grouped(self, query_shape, value_shape, key_shape) -> None:
        self._check_plain(len(query_shape), "num_kv_heads")
        config = self.get_config()
        queries, keys = (None, self.num_heads, self.key_dim), (None, self.num_kv_heads, self.key_dim)
        values, context = (None, self.num_kv_heads, self.value_dim), (*query_shape[:-1], self.num_heads, self.value_dim)
        outputs = (None, *(config["output_shape"] or query_shape[-1:]))
        # The names under which the parent class looks for its parts (`query_dense` and so on).
        self._query_dense = self._projection("query", "abc,cde->abde", queries, query_shape)
        self._key_dense = self._projection("key", "abc,cde->abde", keys, key_shape)
        self._value_dense = self._projection("value", "abc,cde->abde", values, value_shape)
        bound = "efgh"[: len(outputs) - 1]
        self._output_dense = self._projection("attention_output", f"abcd,cd{bound}->ab{bound}", outputs, context)
        self._dropout_layer = keras.layers.Dropout(self.dropout, seed=config["seed"], dtype=self.dtype_policy)

    def _projection(self, name: str, equation: str, output_shape: tuple, input_shape: tuple) -> keras.layers.Layer:
        config = self.get_config()
        parts = ("initializer", "regularizer", "constraint")
        shared = {f"{what}_{part}": config[f"{what}_{part}"] for what in ("kernel", "bias") for part in parts}
        bias_axes = equation.split("->ab")[1] if self.use_bias else None
        layer = keras.layers.EinsumDense(
            equation,
            output_shape,
            bias_axes=bias_axes,
            activity_regularizer=config["activity_regularizer"],
            dtype=self.dtype_policy,
            name=name,
            **shared,
        )
        layer.build(input_shape)
        return layer

    def create_cache(self, batch: int, length: int):
        """An empty cache: zeros [2, batch, length, num_kv_heads, key_dim] in the compute dtype, keys first."""
        if min(batch, length) < 0:
            raise _error(f"a cache has a batch and a length of 0 or more; got {batch} and {length}; give both")
        return ops.zeros((2, batch, length, self.num_kv_heads, self.key_dim), dtype=self.compute_dtype)

    def __call__(self, *args, **kwargs):
        # Keras would make tensors of numpy's integers, whose values are not looked at.
        return super().__call__(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    def call(
        self,
        query,
        value,
        key=None,
        cache=None,
        step=None,
        training=False,
        attention_mask=None,
        return_attention_scores=False,
        use_causal_mask=True,
        query_mask=None,
        value_mask=None,
        key_mask=None,
    ):
        if cache is None and self.num_kv_heads == self.num_heads:
            result = super().call(
                query,
                value,
                key=key,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=use_causal_mask,
            )
            return (*result, None) if return_attention_scores else (result, None)
        k, v = self.key_dense(value if key is None else key), self.value_dense(value)
        first, written = 0, ops.shape(value)[1]
        if cache is not None:
            self._check_cached(query, value, cache, step, training, use_causal_mask)
            if attention_mask is None and not (value_mask is None and key_mask is None):
                raise _error("a cache does not remember masks; got masked values; say in attention_mask what to see")
            value_mask = key_mask = None
            cache, first = _extended(cache, ops.stop_gradient(ops.stack([k, v])), step)
            written = first + written
            k, v = cache[0], cache[1]
            # 0 times what was never written would still be NaN.
            v = ops.where((ops.arange(ops.shape(v)[1], dtype="int32") < written)[:, None, None], v, ops.zeros_like(v))
        T, S = ops.shape(query)[1], ops.shape(k)[1]
        seen = self._seen(T, S, first, written, use_causal_mask)  # [T, S]
        for mask in (value_mask, key_mask):
            seen = seen if mask is None else seen & ops.cast(mask, "bool")[:, None]
        seen = _broadcast(seen, attention_mask, self.num_kv_heads, T, S)
        output, scores = self._attend(self.query_dense(query), k, v, seen, training)
        output = self.output_dense(output)
        return (output, scores, cache) if return_attention_scores else (output, cache)

    def _seen(self, T, S, first, written, causal: bool):
        """Whether the query of a row sees the key of a column; bool [T, S]."""
        slots, positions = ops.arange(S, dtype="int32")[None], first + ops.arange(T, dtype="int32")[:, None]
        seen = slots <= positions if causal else slots < written + ops.zeros_like(positions)
        return seen if self._window is None else seen & (ops.abs(positions - slots) < self._window)

    def _attend(self, q, k, v, seen, training):
        """q [B, T, heads, key_dim]; k, v [B, S, kv heads, .]; seen broadcasts to [B, kv heads, group, T, S]."""
        B, T, heads, kv_heads = *ops.shape(q)[:2], self.num_heads, self.num_kv_heads
        q = ops.reshape(q, (B, T, kv_heads, heads // kv_heads, self.key_dim)) * self.key_dim**-0.5
        exact = keras.backend.result_type(self.compute_dtype, "float32")
        scores = ops.cast(ops.einsum("btkgd,bskd->bkgts", q, k), exact)
        scores = ops.softmax(ops.where(seen, scores, float(np.finfo(np.float32).min)), axis=-1)
        scores = ops.cast(scores, self.compute_dtype)
        output = ops.einsum("bkgts,bskd->btkgd", self._dropout_layer(scores, training=training), v)
        merged = ops.reshape(scores, (B, heads, T, ops.shape(k)[1]))
        return ops.reshape(output, (B, T, heads, self.value_dim)), merged

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        cache=None,
        step=None,
        training=False,
        attention_mask=None,
        return_attention_scores=False,
        use_causal_mask=True,
        query_mask=None,
        value_mask=None,
        key_mask=None,
    ):
        shape = self.compute_output_shape(query.shape, value.shape, None if key is None else key.shape)
        S = value.shape[1]
        # Keras has no symbol for "no tensor": an empty tuple stands for None, in a functional model only.
        kept: Any = ()
        if cache is not None:
            self._check_cached(query, value, cache, step, training, use_causal_mask)
            lengths = [cache.shape[2]] if step is not None else [cache.shape[2], S]
            S = None if None in lengths else sum(lengths)
            sizes = (2, query.shape[0], S, self.num_kv_heads, self.key_dim)
            kept = keras.KerasTensor(sizes, dtype=self.compute_dtype)
        output = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return output, kept
        rank = len(query.shape)
        axes = [a % rank for a in self.attention_axes or range(1, rank - 1)]
        batch = [query.shape[a] for a in range(rank - 1) if a not in axes]
        keys = [value.shape[a] for a in axes] if cache is None else [S]
        sizes = (*batch, self.num_heads, *(query.shape[a] for a in axes), *keys)
        return output, keras.KerasTensor(sizes, dtype=self.compute_dtype), kept

    def get_config(self) -> dict[str, Any]:
        kv_heads = None if self.num_kv_heads == self.num_heads else self.num_kv_heads
        return {**super().get_config(), "num_kv_heads": kv_heads}

    def _check_plain(self, rank: int, what: str) -> None:
        if rank != 3 or self.attention_axes not in (None, (1,)):
            raise _error(
                f"{what} needs inputs [B, T, dim]; got {rank} axes, attended along {self.attention_axes}; reshape"
            )
        if self._gated:
            raise _error(f"{what} and use_gate do not go together; leave one out")

    def _check_cached(self, query, value, cache, step, training, causal: bool) -> None:
        self._check_plain(len(query.shape), "a cache")
        if training:
            raise _error("a cache passes no gradients on; got training=True; train on whole sequences without it")
        if self.key_dim != self.value_dim:
            raise _error(
                f"a cache needs value_dim = key_dim = {self.key_dim}; got {self.value_dim}; leave value_dim out"
            )
        expected = (2, query.shape[0], None, self.num_kv_heads, self.key_dim)
        if len(cache.shape) != 5 or any(
            None not in (n, m) and n != m for n, m in zip(cache.shape, expected, strict=True)
        ):
            raise _error(f"a cache has the shape {expected}; got {tuple(cache.shape)}; make it with create_cache")
        T, L, S = query.shape[1], value.shape[1], cache.shape[2]
        if causal and None not in (T, L) and T != L:
            raise _error(f"query and value are the same positions; got {T} and {L}; else give use_causal_mask=False")
        if isinstance(step, int):
            if step < 0 or (None not in (L, S) and step + L > S):
                raise _error(f"step ... step + {L} - 1 must lie in a cache of {S}; got step={step}; make a longer one")
        elif step is not None and (
            not keras.backend.is_int_dtype(getattr(step, "dtype", float)) or len(step.shape) > 0
        ):
            raise _error(f"step must be one integer; got {step}; give the number of positions in the cache")


def _error(text: str) -> ThriftyError:
    return ThriftyError(f"[CachedMultiHeadAttention] {text}")


def _extended(cache, new, step):
    """The cache with `new` [2, B, L, kv heads, key_dim] in it, and the slot where it begins."""
    new = ops.cast(new, cache.dtype)
    if step is None:
        return ops.concatenate([cache, new], axis=2), ops.shape(cache)[2]
    if isinstance(step, int):
        return ops.slice_update(cache, [0, 0, step, 0, 0], new), step
    step = ops.cast(step, "int32")
    zero = ops.zeros_like(step)
    return ops.slice_update(cache, ops.stack([zero, zero, step, zero, zero]), new), step


def _broadcast(seen, mask, kv_heads: int, T, S):
    """seen [T, S] or [B, T, S] and the caller's mask, as bool [B or 1, kv heads or 1, group or 1, T, S]."""
    seen = ops.reshape(seen, (-1, 1, 1, T, S))
    if mask is None:
        return seen
    shape = tuple(mask.shape)
    fits = zip(shape[-2:], (T, S), strict=False)
    if len(shape) not in (2, 3, 4) or any(n not in (1, None, m) for n, m in fits if isinstance(m, int)):
        raise _error(
            f"attention_mask has the shape [T, S], [B, T, S] or [B, num_heads, T, S] with T = {T} queries and S = {S} "
            f"keys; got {shape}; with a cache, S is its length"
        )
    mask = ops.cast(mask, "bool")
    if len(shape) == 4:
        B, heads, *rest = ops.shape(mask)
        return seen & ops.reshape(mask, (B, *((1, 1) if heads == 1 else (kv_heads, heads // kv_heads)), *rest))
    return seen & (mask if len(shape) == 2 else mask[:, None, None])
