"""The arithmetic of a decoder over numpy arrays: tokens in, logits out."""

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from thrifty.checkpoint import DecoderConfig, Folder
from thrifty.checkpoint.names import EMBEDDING, FINAL_NORM, HEAD, has_bias, linear_shapes
from thrifty.runtime._native import PackedMatrix, rms_norm
from thrifty.runtime.attention import attention
from thrifty.runtime.cache import Cache
from thrifty.runtime.projection import DenseProjection, FloatMatrix, TernaryProjection
from thrifty.spec import ACTIVATIONS, rope_tables

#: Positions computed at a time when a prompt is read; memory does not grow with the prompt.
PREFILL_ROWS = 128
#: Positions whose logits are held at a time: a large vocabulary makes them the largest array.
HEAD_ROWS = 16

Projection = TernaryProjection | DenseProjection


class Decoder:
    """y = head(norm(layers(embed(tokens)))): the block of DESIGN's one decoder with mixer `attention`.

    h = x + o(attn_sub_norm(attn(qkv(input_layernorm(x))))); x = h + down(ffn_sub_norm(act(gate z) * up z)), z =
    post_attention_layernorm(h); `pre` has no sub-norms, `mlp` no gate. Every low-bit linear quantises its input per
    token; products with one input are stacked into one. One step at a time: the buffers are shared, a lock guards them.
    """

    def __init__(self, folder: Folder, weight_format: str, n_threads: int, max_context: int) -> None:
        config = folder.config
        self.config = config
        self.max_context = max_context
        self._embedding = folder.tensors[EMBEDDING]
        self._head = FloatMatrix(folder.tensors[EMBEDDING if config.tie_word_embeddings else HEAD])
        self._final_gain = folder.float32(FINAL_NORM)
        self._layers = [
            _Layer(folder, f"model.layers.{layer}.", weight_format, n_threads)
            for layer in range(config.num_hidden_layers)
        ]
        self._cos, self._sin = _rope(config, max_context)
        self._one = _Buffers(config, 1)
        self._many: _Buffers | None = None
        self._lock = threading.Lock()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads."""
        return self._head.nbytes + sum(p.nbytes for layer in self._layers for p in layer.projections)

    def advance(self, tokens: Sequence[int], cache: Cache) -> np.ndarray:
        """Run `tokens` after those in `cache`, and keep them there. Returns logits float32 [vocab] after the last."""
        hidden = np.empty(0)
        for start in range(0, len(tokens), PREFILL_ROWS):
            hidden = self._forward(tokens[start : start + PREFILL_ROWS], cache)
        logits = np.empty((1, self.config.vocab_size), np.float32)
        self._head.matmul(hidden[-1:], logits)
        return logits[0]

    def logits(self, tokens: Sequence[int], cache: Cache) -> Iterator[np.ndarray]:
        """Like `advance`, with the logits after every token: float32 [HEAD_ROWS or fewer, vocab], in order."""
        for start in range(0, len(tokens), PREFILL_ROWS):
            hidden = self._forward(tokens[start : start + PREFILL_ROWS], cache)
            for row in range(0, len(hidden), HEAD_ROWS):
                rows = hidden[row : row + HEAD_ROWS]
                logits = np.empty((len(rows), self.config.vocab_size), np.float32)
                self._head.matmul(rows, logits)
                yield logits

    def _forward(self, tokens: Sequence[int], cache: Cache) -> np.ndarray:
        """Hidden states float32 [T, hidden] after the final norm, T at most PREFILL_ROWS."""
        T, first = len(tokens), len(cache)
        with self._lock, np.errstate(over="ignore", under="ignore"):
            buffers = self._buffers(T)
            x = self._embed(tokens)
            cos, sin = self._cos[first : first + T], self._sin[first : first + T]
            for index, layer in enumerate(self._layers):
                layer(x, buffers, cos, sin, cache.keys[index], cache.values[index], first)
            cache.tokens.extend(tokens)
            return rms_norm(x, self._final_gain, self.config.rms_norm_eps)

    def _embed(self, tokens: Sequence[int]) -> np.ndarray:
        table = self._embedding
        return type(table)(table.dtype, table.data[np.asarray(tokens, np.int64)]).float32()

    def _buffers(self, T: int) -> "_Buffers":
        if T == 1:
            return self._one
        if self._many is None:
            self._many = _Buffers(self.config, PREFILL_ROWS)
        return self._many.first(T)


class _Buffers:
    """Scratch of a step of T positions."""

    def __init__(self, config: DecoderConfig, T: int) -> None:
        heads = config.num_attention_heads + config.num_key_value_heads
        inner = config.intermediate_size * (2 if config.feed_forward == "glu" else 1)
        self.qkv = np.zeros((T, config.q_size + 2 * config.kv_size), np.float32)
        self.turned = np.zeros((T, heads, 2, config.head_dim // 2), np.float32)
        self.swapped = np.zeros_like(self.turned)
        self.attended = np.zeros((T, config.q_size), np.float32)
        self.inner = np.zeros((T, inner), np.float32)
        self.residual = np.zeros((T, config.hidden_size), np.float32)

    def first(self, T: int) -> "_Buffers":
        """Views of the first T positions."""
        part = object.__new__(_Buffers)
        part.__dict__ = {name: array[:T] for name, array in self.__dict__.items()}
        return part


class _Layer:
    def __init__(self, folder: Folder, prefix: str, weight_format: str, n_threads: int) -> None:
        config = folder.config
        sub_ln = config.norm_placement == "sub_ln"

        def gain(norm: str) -> np.ndarray:
            return folder.float32(f"{prefix}{norm}.weight")

        def projection(linears: list[str], gain: np.ndarray | None) -> Projection:
            return _projection(folder, prefix, linears, gain, weight_format, n_threads)

        gate_up = ["mlp.gate_proj", "mlp.up_proj"] if config.feed_forward == "glu" else ["mlp.up_proj"]
        self._qkv = projection([f"self_attn.{x}_proj" for x in "qkv"], gain("input_layernorm"))
        self._o = projection(["self_attn.o_proj"], gain("self_attn.attn_sub_norm") if sub_ln else None)
        self._up = projection(gate_up, gain("post_attention_layernorm"))
        self._down = projection(["mlp.down_proj"], gain("mlp.ffn_sub_norm") if sub_ln else None)
        self.projections = (self._qkv, self._o, self._up, self._down)
        self._act = _activation(config)
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._head_dim = config.head_dim

    def __call__(
        self,
        x: np.ndarray,
        buffers: _Buffers,
        cos: np.ndarray,
        sin: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        first: int,
    ) -> None:
        """Replace x float32 [T, hidden] by the layer's output."""
        T = x.shape[0]
        heads, kv_heads, d = self._heads, self._kv_heads, self._head_dim
        self._qkv(x, buffers.qkv)
        split = (heads + kv_heads) * d
        pairs = buffers.qkv[:, :split].reshape(T, heads + kv_heads, 2, d // 2)
        np.multiply(pairs, cos, buffers.turned)
        np.multiply(pairs[:, :, ::-1], sin, buffers.swapped)
        np.add(buffers.turned, buffers.swapped, buffers.turned)
        turned = buffers.turned.reshape(T, heads + kv_heads, d)
        keys[:, first : first + T] = turned[:, heads:].transpose(1, 0, 2)
        values[:, first : first + T] = buffers.qkv[:, split:].reshape(T, kv_heads, d).transpose(1, 0, 2)
        attention(turned[:, :heads], keys, values, first, buffers.attended)
        self._o(buffers.attended, buffers.residual)
        np.add(x, buffers.residual, x)
        self._up(x, buffers.inner)
        self._down(self._act(buffers.inner), buffers.residual)
        np.add(x, buffers.residual, x)


def _projection(
    folder: Folder, prefix: str, linears: list[str], gain: np.ndarray | None, weight_format: str, n_threads: int
) -> Projection:
    """One product of several linears with the same input, their rows stacked."""
    config = folder.config
    rows = [linear_shapes(config)[linear][0] for linear in linears]
    bias = None
    if has_bias(config, linears[0]):
        bias = np.concatenate([folder.float32(f"{prefix}{linear}.bias") for linear in linears])
    if config.linear == "dense":
        matrix = FloatMatrix(*(folder.tensors[f"{prefix}{linear}.weight"] for linear in linears))
        return DenseProjection(matrix, bias, gain, config.rms_norm_eps)
    parts = [folder.codes(prefix + linear, n) for linear, n in zip(linears, rows, strict=True)]
    codes = np.concatenate([codes for codes, _ in parts]) if len(parts) > 1 else parts[0][0]
    scale = np.array([scale for _, scale in parts], np.float32)
    if len(parts) > 1:
        scale = np.repeat(scale, rows)
    packed = PackedMatrix.from_codes(codes, weight_format)
    return TernaryProjection(packed, scale, bias, gain, config.rms_norm_eps, n_threads)


def _activation(config: DecoderConfig) -> Callable[[np.ndarray], np.ndarray]:
    act, inner = ACTIVATIONS[config.hidden_act], config.intermediate_size
    if config.feed_forward == "mlp":
        return act
    return lambda gate_up: act(gate_up[:, :inner]) * gate_up[:, inner:]


def _rope(config: DecoderConfig, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables [positions, 1, 2, head_dim / 2] so that x * cos + swap(x) * sin is `spec.apply_rope`."""
    cos, sin = rope_tables(np.arange(positions), config.head_dim, config.rope_theta)
    return np.stack([cos, cos], 1)[:, None], np.stack([-sin, sin], 1)[:, None]
