"""The arithmetic of a decoder over numpy arrays, for an installation without the native library."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from thrifty import native
from thrifty.checkpoint import Folder, Tensor
from thrifty.checkpoint.names import EMBEDDING, FINAL_NORM, HEAD, has_bias, linear_shapes
from thrifty.runtime.activation import activation
from thrifty.runtime.attention import attention
from thrifty.runtime.cache import NumpyCache
from thrifty.runtime.projection import DenseProjection, TernaryProjection, make_head
from thrifty.runtime.rope import RopeTables
from thrifty.runtime.workspace import Workspace

#: Positions computed at a time when a prompt is read; memory does not grow with the prompt.
PREFILL_ROWS = 128
#: Positions whose logits are held at a time: a large vocabulary makes them the largest array.
HEAD_ROWS = 16

Projection = TernaryProjection | DenseProjection


class NumpyDecoder:
    """y = head(norm(layers(embed(tokens)))): the one decoder of `thrifty.models` with mixer `attention`.

    h = x + o(attn_sub_norm(attn(qkv(input_layernorm(x))))); x = h + down(ffn_sub_norm(act(gate z) * up z)), z =
    post_attention_layernorm(h); `pre` has no sub-norms, `mlp` no gate. Every low-bit linear quantises its input per
    token; products with one input are stacked into one. The buffers are shared by all sequences; a lock guards them.
    """

    def __init__(self, folder: Folder, max_context: int, head_bits: int | None = None) -> None:
        config = folder.config
        self.config = config
        self.max_context = max_context
        self._embedding = folder.tensors[EMBEDDING]
        self._head = make_head(folder.tensors[EMBEDDING if config.tie_word_embeddings else HEAD], head_bits)
        self._final_gain = folder.float32(FINAL_NORM)
        self._layers = [_Layer(folder, f"model.layers.{layer}.") for layer in range(config.num_hidden_layers)]
        self._rope = RopeTables(max_context, config.head_dim, config.rope_theta)
        self._work = Workspace(config, PREFILL_ROWS)
        self._one = self._work.rows(1)
        self._lock = threading.Lock()

    @property
    def most_sequences(self) -> int:
        """Sequences that one call of `advance_batch` takes."""
        return 32

    @property
    def most_rows(self) -> int:
        """Positions whose logits one step gives, with the bits of as many steps: numpy's depend on the rows."""
        return 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads."""
        return self._head.nbytes + sum(p.nbytes for layer in self._layers for p in layer.projections)

    def advance(self, tokens: Sequence[int], cache: NumpyCache) -> np.ndarray:
        """Run `tokens` after those in `cache`, and keep them there. Returns logits float32 [vocab] after the last."""
        hidden = np.empty(0)
        for start in range(0, len(tokens), PREFILL_ROWS):
            hidden = self._forward(tokens[start : start + PREFILL_ROWS], cache)
        return self._logits(hidden[-1:])[0]

    def advance_batch(self, tokens: Sequence[int], caches: Sequence[NumpyCache]) -> np.ndarray:
        """One token more for each of several sequences: logits [n, vocab]."""
        return np.stack([self.advance([token], cache) for token, cache in zip(tokens, caches, strict=True)])

    def new_cache(self, capacity: int) -> NumpyCache:
        """A cache of a sequence of up to `capacity` positions."""
        return NumpyCache(self.config, capacity)

    def logits(self, tokens: Sequence[int], cache: NumpyCache) -> Iterator[np.ndarray]:
        """Like `advance`, with the logits after every token: float32 [HEAD_ROWS or fewer, vocab], in order."""
        for start in range(0, len(tokens), PREFILL_ROWS):
            hidden = self._forward(tokens[start : start + PREFILL_ROWS], cache)
            for row in range(0, len(hidden), HEAD_ROWS):
                yield self._logits(hidden[row : row + HEAD_ROWS])

    def _forward(self, tokens: Sequence[int], cache: NumpyCache) -> np.ndarray:
        """Hidden states float32 [T, hidden] after the final norm, T at most PREFILL_ROWS."""
        T, first = len(tokens), len(cache)
        with self._lock, np.errstate(over="ignore", under="ignore"):
            work = self._one if T == 1 else self._work.rows(T)
            work.x[:] = self._embed(tokens)
            cos, sin = _turns(self._rope, first, first + T)
            for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
                layer(work, cos, sin, keys, values, first)
            cache.tokens.extend(tokens)
            return native.rms_norm(work.x, self._final_gain, self.config.rms_norm_eps)

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        with self._lock:
            return self._head(hidden)

    def _embed(self, tokens: Sequence[int]) -> np.ndarray:
        table = self._embedding
        return Tensor(table.dtype, table.data[np.asarray(tokens, np.int64)]).float32()


class _Layer:
    def __init__(self, folder: Folder, prefix: str) -> None:
        config = folder.config
        sub_ln, glu = config.norm_placement == "sub_ln", config.feed_forward == "glu"

        def gain(norm: str) -> np.ndarray:
            return folder.float32(f"{prefix}{norm}.weight")

        def projection(linears: list[str], gain: np.ndarray | None) -> Projection:
            return _projection(folder, prefix, linears, gain)

        gate_up = ["mlp.gate_proj", "mlp.up_proj"] if glu else ["mlp.up_proj"]
        self._qkv = projection([f"self_attn.{x}_proj" for x in "qkv"], gain("input_layernorm"))
        self._o = projection(["self_attn.o_proj"], gain("self_attn.attn_sub_norm") if sub_ln else None)
        self._gate_up = projection(gate_up, gain("post_attention_layernorm"))
        self._down = projection(["mlp.down_proj"], gain("mlp.ffn_sub_norm") if sub_ln else None)
        self.projections = (self._qkv, self._o, self._gate_up, self._down)
        self._act = activation(config.hidden_act)
        self._glu = glu
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim, self._inner = config.head_dim, config.intermediate_size

    def __call__(
        self, work: Workspace, cos: np.ndarray, sin: np.ndarray, keys: np.ndarray, values: np.ndarray, first: int
    ) -> None:
        """Replace `work.x` by the layer's output; keys and values of the new positions go into the cache."""
        x, added = work.x, work.added
        self._qkv(work.x, work.qkv)
        self._attend(work, cos, sin, keys, values, first)
        self._o(work.attended, work.added)
        np.add(x, added, x)
        self._gate_up(work.x, work.gate_up)
        gate_up, inner = work.gate_up, work.inner
        self._act(gate_up[:, : self._inner], inner)
        if self._glu:
            np.multiply(inner, gate_up[:, self._inner :], inner)
        self._down(work.inner, work.added)
        np.add(x, added, x)

    def _attend(
        self, work: Workspace, cos: np.ndarray, sin: np.ndarray, keys: np.ndarray, values: np.ndarray, first: int
    ) -> None:
        """Turn queries and keys to their positions, keep keys and values, write `work.attended`."""
        qkv, turned, swapped = work.qkv, work.turned, work.swapped
        T, split = qkv.shape[0], (self._heads + self._kv_heads) * self._head_dim
        pairs = qkv[:, :split].reshape(turned.shape)
        np.multiply(pairs, cos, turned)
        np.multiply(pairs[:, :, ::-1], sin, swapped)
        np.add(turned, swapped, turned)
        turned = turned.reshape(T, -1, self._head_dim)
        keys[:, first : first + T] = turned[:, self._heads :].transpose(1, 0, 2)
        values[:, first : first + T] = qkv[:, split:].reshape(T, self._kv_heads, self._head_dim).transpose(1, 0, 2)
        attention(turned[:, : self._heads], keys, values, first, work.attended)


def _projection(folder: Folder, prefix: str, linears: list[str], gain: np.ndarray | None) -> Projection:
    """One product of several linears with the same input, their rows stacked."""
    config = folder.config
    rows = [linear_shapes(config)[linear][0] for linear in linears]
    bias = None
    if has_bias(config, linears[0]):
        bias = np.concatenate([folder.float32(f"{prefix}{linear}.bias") for linear in linears])
    if config.linear == "dense":
        weight = np.concatenate([folder.float32(f"{prefix}{linear}.weight") for linear in linears])
        return DenseProjection(weight, bias, gain, config.rms_norm_eps)
    parts = [folder.codes(prefix + linear, n) for linear, n in zip(linears, rows, strict=True)]
    codes = np.concatenate([codes for codes, _ in parts]) if len(parts) > 1 else parts[0][0]
    scale = np.array([scale for _, scale in parts], np.float32)
    if len(parts) > 1:
        scale = np.repeat(scale, rows)
    packed = native.PackedMatrix.from_codes(codes, "i2")
    return TernaryProjection(packed, scale, bias, gain, config.rms_norm_eps)


def _turns(rope: RopeTables, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables [stop - first, 1, 2, head_dim / 2] so that x * cos + swap(x) * sin is `spec.apply_rope`."""
    rope.reach(stop)
    cos, sin = rope.cos[first:stop], rope.sin[first:stop]
    return np.stack([cos, cos], 1)[:, None], np.stack([-sin, sin], 1)[:, None]
