"""A decoder as a flat program of native ops over preallocated buffers."""

import time
from dataclasses import dataclass, replace

import numpy as np

from thrifty import native
from thrifty.checkpoint import Folder
from thrifty.checkpoint.names import EMBEDDING, FINAL_NORM, HEAD, HEAD_NORM, linear_weights
from thrifty.native import ACTIVATION_IDS, DTYPE_IDS, NO_FLAGS, Epilogue, Op, OpCode, OpFlag, Program
from thrifty.runtime.cache import NativeCache
from thrifty.runtime.experts import add_experts
from thrifty.runtime.mixers import MIXERS
from thrifty.runtime.rope import RopeTables
from thrifty.runtime.states import Layout
from thrifty.runtime.weights import (
    CACHE_LINE,
    Arena,
    Matrix,
    read_dense,
    read_head,
    read_matrix,
    read_ternary_head,
    row_stride,
    tiles_of,
)
from thrifty.spec import CHUNK
from thrifty.spec.formats import TILE_ROWS

#: Bytes of weights below which a model may stay in the processor's caches from step to step.
CACHED_BYTES = 32 << 20
#: Bytes of low-bit weights that a step must read for its time to tell of the format.
_TIMED_BYTES = 8 << 20
_ROUNDS = 7
#: Rows of a step whose attention may be split over the cache between threads.
_SPLIT_ROWS = 8


@dataclass(frozen=True)
class Options:
    """How a decoder is laid out in memory and run."""

    weight_format: str
    head_bits: int | None
    cache_dtype: str
    n_threads: int
    max_context: int
    #: Most rows of a step, and most whose logits it gives.
    rows: int
    outputs: int


class DecoderProgram:
    """The ops of a whole step; those from `head` on turn hidden states into logits.

    h = a * x + o(attn_sub_norm(mixer(input_layernorm(x)))); x = b * h + down(ffn_sub_norm(act(gate z) * up z)), z =
    post_attention_layernorm(h); a and b are ones where residuals are plain; `pre` has no sub-norms, `mlp` no gate;
    `runtime.mixers` has the mixers, `runtime.experts` what routed experts add. Every low-bit linear quantises its
    input, after a norm of its own where linears have one.
    """

    def __init__(self, folder: Folder, options: Options, layers: int | None = None) -> None:
        """layers: only so many, and no head; None for the whole decoder."""
        self.folder, self.config, self.options = folder, folder.config, options
        self.layout = Layout(folder.config, options.cache_dtype)
        self.ops: list[Op] = []
        self.arena = Arena()
        self.weight_bytes = 0
        self._make_buffers()
        self._embed()
        for layer in range(folder.config.num_hidden_layers if layers is None else layers):
            MIXERS[self.config.mixer(layer)](self, layer)
            self._feed_forward(layer)
        self.head = len(self.ops)
        if layers is None:
            self._head()
        self.program = Program(self.ops, options.rows, options.outputs, options.n_threads)

    def _make_buffers(self) -> None:
        c, rows = self.config, self.options.rows
        mixed = max(c.q_size, c.hidden_size)
        wide = TILE_ROWS * max(tiles_of(c.q_size) + 2 * tiles_of(c.kv_size), 3 * tiles_of(mixed))
        self.x = _floats(rows, c.hidden_size)
        self._projected = _floats(rows, wide).reshape(-1)
        self._mixed = _floats(rows, mixed).reshape(-1)
        self.inner = _floats(rows, c.intermediate_size)
        self.logits = np.zeros((self.options.outputs, c.vocab_size), np.float32)
        # One row of a step is normalised by every thread for itself; no more than these take part.
        own = max(rows, min(self.options.n_threads, native.MOST_THREADS))
        widest = max(mixed, c.intermediate_size)
        # A row is padded to a block of its format, and then to a cache line.
        self._codes = native.aligned_empty(own * (widest + 2 * CACHE_LINE)).view(np.int8)
        self._scales = np.zeros(own, np.float32)
        whole = c.linear == "dense" or c.linear_norm_eps is not None
        self._normed = _floats(own, widest if whole else c.hidden_size)
        self.rope = RopeTables(self.options.max_context, c.head_dim, c.rope_theta, c.rope_scaling)
        part = c.num_attention_heads * (-(-c.head_dim // 16) * 16 + 16)
        parts = _SPLIT_ROWS * -(-self.options.max_context // CHUNK) if self.layout.count("attention") else 0
        self.scratch = np.zeros(max(parts * part, 1), np.float32)

    def projected(self, width: int) -> np.ndarray:
        """The buffer of what a mixer projects, as [rows, width]; mixers share its memory."""
        return self._projected[: self.options.rows * width].reshape(-1, width)

    def mixed(self, width: int) -> np.ndarray:
        """The buffer of what a mixer gives, as [rows, width]."""
        return self._mixed[: self.options.rows * width].reshape(-1, width)

    def _embed(self) -> None:
        table = self.folder.tensors[EMBEDDING]
        data, dtype = table.data, table.dtype
        if dtype not in DTYPE_IDS:
            data, dtype = table.float32(), "F32"
        shape = (*table.shape, DTYPE_IDS[dtype], self.x.shape[1])
        self.ops.append(Op(OpCode.EMBED, shape, (data, self.x)))

    def _feed_forward(self, layer: int) -> None:
        c = self.config
        up, how = ["mlp.up_proj"], Epilogue.ACT
        if c.feed_forward == "glu":
            up, how = ["mlp.gate_proj", *up], Epilogue.GATE_UP
        act = ACTIVATION_IDS[c.hidden_act]
        self.linears(layer, up, "post_attention_layernorm", self.x, self.inner, how, act)
        if c.experts is not None:
            add_experts(self, layer)
            return
        self.add(layer, "mlp.down_proj", "mlp.ffn_sub_norm", self.inner, "post_attention_residual")

    def _head(self) -> None:
        c, folder, gain = self.config, self.folder, self.folder.float32(FINAL_NORM)
        rows = OpFlag.OUTPUTS | OpFlag.GATHER
        if c.ternary_head:
            matrix = read_ternary_head(folder, self.options.weight_format, self.arena)
            self._norm(self.x, gain, rows)
            own, eps = folder.float32(HEAD_NORM), c.linear_norm_eps
            self.product(matrix, self._normed, own, self.logits, c.vocab_size, rows=OpFlag.OUTPUTS, eps=eps)
        else:
            stored, bits = folder.tensors[EMBEDDING if c.tie_word_embeddings else HEAD], self.options.head_bits
            matrix = read_head(stored, bits, self.options.n_threads, self.arena)
            self.product(matrix, self.x, gain, self.logits, c.vocab_size, rows=rows)
        self.weight_bytes += matrix.nbytes

    def _norm(self, x: np.ndarray, gain: np.ndarray, flags: OpFlag = NO_FLAGS) -> None:
        """RMSNorm of rows of x, for several products."""
        sizes = (len(gain), row_stride(x), self._normed.shape[1])
        self.ops.append(Op(OpCode.RMS_NORM, sizes, (x, gain, self._normed), (self.config.rms_norm_eps,), flags))

    def product(
        self,
        matrix: Matrix,
        x: np.ndarray,
        gain: np.ndarray | None,
        y: np.ndarray,
        y_cols: int,
        epilogue: Epilogue = Epilogue.STORE,
        activation: int = 0,
        rows: OpFlag = NO_FLAGS,
        factors: np.ndarray | None = None,
        eps: float | None = None,
    ) -> None:
        """Norm where there is a gain (eps: the config's unless given), quantisation for low-bit weights, product."""
        norm, first = (self.config.rms_norm_eps if eps is None else eps,), OpFlag.PRIVATE | rows
        after = OpFlag.PRIVATE | rows & OpFlag.OUTPUTS
        d, stride = matrix.cols, row_stride(x)
        if matrix.scale is not None:
            flags = first if gain is None else first | OpFlag.NORM
            quantized = (x, gain, self._codes, self._scales)
            self.ops.append(Op(OpCode.QUANTIZE, (d, stride, matrix.width), quantized, norm, flags))
            product = matrix.product(self._codes, self._scales, y, y_cols, epilogue, activation, after, factors)
            self.ops.append(product)
            return
        if gain is None:
            self.ops.append(matrix.product(x, None, y, y_cols, epilogue, activation, factors=factors))
            return
        normed = self._normed
        self.ops.append(Op(OpCode.RMS_NORM, (d, stride, normed.shape[1]), (x, gain, normed), norm, first))
        self.ops.append(matrix.product(normed, None, y, y_cols, epilogue, activation, after, factors))

    def linears(
        self,
        layer: int,
        names: list[str],
        norm: str | None,
        x: np.ndarray,
        y: np.ndarray,
        epilogue: Epilogue = Epilogue.STORE,
        activation: int = 0,
        factors: np.ndarray | None = None,
    ) -> None:
        """Linears of a layer on norm(x), side by side in y, each padded to whole tiles; a gate and its up in one place.

        They are one product, but where each has a norm of its own, and so an input of its own.
        """
        eps, pair = self.config.linear_norm_eps, epilogue == Epilogue.GATE_UP
        gain = None if norm is None else self.gain(layer, norm)
        if eps is None:
            matrix = self.matrix(layer, names, interleaved=pair)
            self.product(matrix, x, gain, y, y.shape[1], epilogue, activation, factors=factors)
            return
        if gain is not None:
            self._norm(x, gain)
            x = self._normed
        hows = [Epilogue.ACT, Epilogue.MULTIPLY] if pair else [epilogue] * len(names)
        for name, how in zip(names, hows, strict=True):
            matrix, own = self.matrix(layer, [name]), self.gain(layer, f"{name}.rms_norm")
            cols = min(matrix.rows, y.shape[1])
            self.product(matrix, x, own, y, cols, how, activation, factors=factors, eps=eps)
            y = y if pair else y[:, cols:]

    def add(self, layer: int, linear: str, norm: str, x: np.ndarray, residual: str) -> None:
        """Add a linear of sub-norm(x) to the residual stream, which is scaled before where residuals are."""
        sub_norm = norm if self.config.norm_placement == "sub_ln" else None
        self.linears(layer, [linear], sub_norm, x, self.x, Epilogue.ADD, factors=self.factors(layer, residual))

    def matrix(self, layer: int, linears: list[str], interleaved: bool = False) -> Matrix:
        """Linears of a layer as one matrix."""
        order = "interleaved" if interleaved else "stacked"
        options = self.options
        how = (order, options.weight_format, options.n_threads, self.arena)
        matrix = read_matrix(self.folder, layer, linears, *how)
        self.weight_bytes += matrix.nbytes
        return matrix

    def dense(self, layer: int, name: str) -> Matrix:
        """A linear of a layer that is dense whatever the others are."""
        matrix = read_dense(self.folder, f"model.layers.{layer}.{name}", self.arena)
        self.weight_bytes += matrix.nbytes
        return matrix

    def values(self, layer: int, name: str) -> np.ndarray:
        """A tensor of a layer as float32."""
        return self.folder.float32(f"model.layers.{layer}.{name}")

    def gain(self, layer: int, norm: str) -> np.ndarray:
        """The gain of a norm of a layer."""
        return self.values(layer, f"{norm}.weight")

    def factors(self, layer: int, residual: str) -> np.ndarray | None:
        """Of the residual stream before a block is added, None for ones."""
        return self.values(layer, residual) if self.config.residual == "scaled" else None


def fastest_format(folder: Folder, options: Options) -> str:
    """'i2' or 'base3', whichever decodes faster here, on these threads: a token through the first layers is timed in
    both, from memory unless the model is small."""
    config = folder.config
    weights = linear_weights(config)
    layers = min(config.num_hidden_layers, -(-4 * _TIMED_BYTES * config.num_hidden_layers // weights))
    evict = weights // 4 > CACHED_BYTES
    decoders = {
        name: DecoderProgram(folder, replace(options, weight_format=name, rows=1, outputs=1), layers)
        for name in ("i2", "base3")
    }
    cache = NativeCache(Layout(config, options.cache_dtype), 1)
    seconds = dict.fromkeys(decoders, np.inf)
    for _ in range(_ROUNDS):
        for name, decoder in decoders.items():
            decoder.rope.reach(1)
            for op in decoder.program.ops if evict else ():
                if op.code == OpCode.MATMUL and op.p[0] is not None:
                    native.cache_evict(op.p[0])
            start = time.perf_counter()
            decoder.program.run(1, 0, [cache.place])
            # Other work only ever adds to a time.
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=lambda name: seconds[name])


def _floats(rows: int, cols: int) -> np.ndarray:
    """Zeros float32 [rows, cols] on huge pages: a tile of a product writes a line of each row, else a page of each."""
    out = native.aligned_empty(rows * cols * 4).view(np.float32).reshape(rows, cols)
    out[:] = 0
    return out
