"""The arithmetic of a decoder over numpy arrays, for an installation without the native library."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from thrifty import native
from thrifty.checkpoint import Folder, Tensor
from thrifty.checkpoint.names import EMBEDDING, FINAL_NORM
from thrifty.runtime.activation import activation
from thrifty.runtime.cache import NumpyCache
from thrifty.runtime.fallback_experts import Experts
from thrifty.runtime.fallback_mixers import MIXERS, Linears, Step
from thrifty.runtime.projection import make_head
from thrifty.runtime.rope import RopeTables

#: Positions computed at a time when a prompt is read; memory does not grow with the prompt.
PREFILL_ROWS = 128
#: Positions whose logits are held at a time: a large vocabulary makes them the largest array.
HEAD_ROWS = 16


class NumpyDecoder:
    """y = head(norm(layers(embed(tokens)))): the one decoder of `thrifty.models`.

    h = a * x + o(attn_sub_norm(mixer(input_layernorm(x)))); x = b * h + down(ffn_sub_norm(act(gate z) * up z)), z =
    post_attention_layernorm(h); a and b are ones where residuals are plain; `pre` has no sub-norms, `mlp` no gate.
    Every low-bit linear quantises its input per token; products with one input are stacked into one. A lock guards the
    buffers of the products.
    """

    def __init__(self, folder: Folder, max_context: int, head_bits: int | None = None) -> None:
        config = folder.config
        self.config = config
        self.max_context = max_context
        self._embedding = folder.tensors[EMBEDDING]
        self._head = make_head(folder, head_bits)
        self._final_gain = folder.float32(FINAL_NORM)
        self._layers = [_Layer(folder, layer) for layer in range(config.num_hidden_layers)]
        self._rope = RopeTables(max_context, config.head_dim, config.rope_theta, config.rope_scaling)
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
        return self._head.nbytes + sum(layer.nbytes for layer in self._layers)

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
        first, stop = len(cache), len(cache) + len(tokens)
        with self._lock, np.errstate(over="ignore", under="ignore"):
            self._rope.reach(stop)
            x = self._embed(tokens)
            for number, layer in enumerate(self._layers):
                step = Step(self._rope.cos[first:stop], self._rope.sin[first:stop], cache, number, first)
                x = layer(x, step)
            cache.tokens.extend(tokens)
            return native.rms_norm(x, self._final_gain, self.config.rms_norm_eps)

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        with self._lock:
            return self._head(hidden)

    def _embed(self, tokens: Sequence[int]) -> np.ndarray:
        table = self._embedding
        return Tensor(table.dtype, table.data[np.asarray(tokens, np.int64)]).float32()


class _Layer:
    def __init__(self, folder: Folder, layer: int) -> None:
        config, prefix = folder.config, f"model.layers.{layer}."
        self._glu = config.feed_forward == "glu"
        self._inner, self._act = config.intermediate_size, activation(config.hidden_act)
        sub_ln = config.norm_placement == "sub_ln"
        self._mixer = MIXERS[config.mixer(layer)](folder, layer)
        gate_up = ["mlp.gate_proj", "mlp.up_proj"] if self._glu else ["mlp.up_proj"]
        ffn_sub_norm = "mlp.ffn_sub_norm" if sub_ln and config.experts is None else None
        self._o = Linears(folder, layer, ["self_attn.o_proj"], "self_attn.attn_sub_norm" if sub_ln else None)
        self._gate_up = Linears(folder, layer, gate_up, "post_attention_layernorm")
        self._down = Linears(folder, layer, ["mlp.down_proj"], ffn_sub_norm)
        self._experts = None if config.experts is None else Experts(folder, layer)
        names = ("input_residual", "post_attention_residual")
        scaled = config.residual == "scaled"
        self._factors = [folder.float32(prefix + name) if scaled else np.float32(1) for name in names]
        self.nbytes = sum(part.nbytes for part in (self._mixer, self._o, self._gate_up, self._down))
        self.nbytes += 0 if self._experts is None else self._experts.nbytes

    def __call__(self, x: np.ndarray, step: Step) -> np.ndarray:
        """The layer's output [T, hidden]; what it needs of the new positions later goes into the cache."""
        x = self._factors[0] * x + self._o(self._mixer(x, step))
        gate_up = self._gate_up(x)
        inner = np.empty((len(x), self._inner), np.float32)
        self._act(gate_up[:, : self._inner], inner)
        if self._glu:
            np.multiply(inner, gate_up[:, self._inner :], inner)
        added = self._down(inner)
        if self._experts is not None:
            added += self._experts(x)
        return self._factors[1] * x + added
