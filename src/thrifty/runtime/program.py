"""A decoder as a flat program of native ops over preallocated buffers."""

import time
from dataclasses import dataclass, replace

import numpy as np

from thrifty import native
from thrifty.checkpoint import Folder
from thrifty.checkpoint.names import EMBEDDING, FINAL_NORM, HEAD, linear_shapes
from thrifty.native import ACTIVATION_IDS, DTYPE_IDS, NO_FLAGS, Epilogue, Op, OpCode, OpFlag, Program
from thrifty.runtime.cache import NativeCache
from thrifty.runtime.rope import RopeTables
from thrifty.runtime.weights import CACHE_LINE, Arena, Matrix, read_head, read_matrix, tiles_of
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

    h = x + o(attn_sub_norm(attn(qkv(input_layernorm(x))))); x = h + down(ffn_sub_norm(act(gate z) * up z)), z =
    post_attention_layernorm(h); `pre` has no sub-norms, `mlp` no gate. Every low-bit linear quantises its input.
    """

    def __init__(self, folder: Folder, options: Options, layers: int | None = None) -> None:
        """layers: only so many, and no head; None for the whole decoder."""
        self._folder, self._config, self._options = folder, folder.config, options
        self._ops: list[Op] = []
        self._arena = Arena()
        self.weight_bytes = 0
        self._make_buffers()
        self._embed()
        for layer in range(folder.config.num_hidden_layers if layers is None else layers):
            self._attention(layer)
            self._feed_forward(layer)
        self.head = len(self._ops)
        if layers is None:
            self._head()
        self.program = Program(self._ops, options.rows, options.outputs, options.n_threads)

    def _make_buffers(self) -> None:
        c, rows = self._config, self._options.rows
        qkv = TILE_ROWS * (tiles_of(c.q_size) + 2 * tiles_of(c.kv_size))
        self._x = _floats(rows, c.hidden_size)
        self._qkv = _floats(rows, qkv)
        self._attended = _floats(rows, c.q_size)
        self._inner = _floats(rows, c.intermediate_size)
        self.logits = np.zeros((self._options.outputs, c.vocab_size), np.float32)
        # One row of a step is normalised by every thread for itself.
        own = max(rows, self._options.n_threads)
        widest = max(c.hidden_size, c.q_size, c.intermediate_size)
        floats = c.linear == "dense" or self._options.head_bits is None
        # A row is padded to a block of its format, and then to a cache line.
        self._codes = native.aligned_empty(own * (widest + 2 * CACHE_LINE)).view(np.int8)
        self._scales = np.zeros(own, np.float32)
        self._normed = _floats(own if floats else 0, widest if c.linear == "dense" else c.hidden_size)
        self.rope = RopeTables(self._options.max_context, c.head_dim, c.rope_theta)
        part = c.num_attention_heads * (-(-c.head_dim // 16) * 16 + 16)
        self._scratch = np.zeros(_SPLIT_ROWS * -(-self._options.max_context // CHUNK) * part, np.float32)

    def _embed(self) -> None:
        table = self._folder.tensors[EMBEDDING]
        data, dtype = table.data, table.dtype
        if dtype not in DTYPE_IDS:
            data, dtype = table.float32(), "F32"
        shape = (*data.shape, DTYPE_IDS[dtype], self._x.shape[1])
        self._ops.append(Op(OpCode.EMBED, shape, (data, self._x)))

    def _attention(self, layer: int) -> None:
        c = self._config
        prefix = f"model.layers.{layer}."
        qkv = self._matrix(prefix, [f"self_attn.{x}_proj" for x in "qkv"])
        self._product(qkv, self._x, self._gain(prefix, "input_layernorm"), self._qkv, self._qkv.shape[1])
        heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, layer, DTYPE_IDS[self._options.cache_dtype])
        k = TILE_ROWS * tiles_of(c.q_size)
        v = k + TILE_ROWS * tiles_of(c.kv_size)
        rope = (*heads, self._qkv.shape[1], k, v)
        self._ops.append(Op(OpCode.ROPE_CACHE, rope, (self._qkv, self.rope.cos, self.rope.sin)))
        sizes = (*heads, self._qkv.shape[1], self._attended.shape[1], self._scratch.size)
        buffers = (self._qkv, self._attended, self._scratch)
        self._ops.append(Op(OpCode.ATTENTION, sizes, buffers, (c.head_dim**-0.5,)))
        o = self._matrix(prefix, ["self_attn.o_proj"])
        self._product(
            o, self._attended, self._sub_gain(prefix, "self_attn.attn_sub_norm"), self._x, c.hidden_size, Epilogue.ADD
        )

    def _feed_forward(self, layer: int) -> None:
        c = self._config
        prefix = f"model.layers.{layer}."
        glu = c.feed_forward == "glu"
        up = self._matrix(prefix, ["mlp.gate_proj", "mlp.up_proj"] if glu else ["mlp.up_proj"], interleaved=True)
        gain, epilogue = self._gain(prefix, "post_attention_layernorm"), Epilogue.GATE_UP if glu else Epilogue.ACT
        act = ACTIVATION_IDS[c.hidden_act]
        self._product(up, self._x, gain, self._inner, c.intermediate_size, epilogue, act)
        down = self._matrix(prefix, ["mlp.down_proj"])
        self._product(
            down, self._inner, self._sub_gain(prefix, "mlp.ffn_sub_norm"), self._x, c.hidden_size, Epilogue.ADD
        )

    def _head(self) -> None:
        c = self._config
        matrix = read_head(
            self._folder.tensors[EMBEDDING if c.tie_word_embeddings else HEAD],
            self._options.head_bits,
            self._options.n_threads,
            self._arena,
        )
        self.weight_bytes += matrix.nbytes
        rows = OpFlag.OUTPUTS | OpFlag.GATHER
        self._product(matrix, self._x, self._folder.float32(FINAL_NORM), self.logits, c.vocab_size, rows=rows)

    def _product(
        self,
        matrix: Matrix,
        x: np.ndarray,
        gain: np.ndarray | None,
        y: np.ndarray,
        y_cols: int,
        epilogue: Epilogue = Epilogue.STORE,
        activation: int = 0,
        rows: OpFlag = NO_FLAGS,
    ) -> None:
        """Norm where there is a gain, quantisation where the weights are low-bit, product."""
        eps, first = (self._config.rms_norm_eps,), OpFlag.PRIVATE | rows
        after = OpFlag.PRIVATE | rows & OpFlag.OUTPUTS
        d, stride = matrix.cols, x.shape[1]
        if matrix.scale is not None:
            flags = first if gain is None else first | OpFlag.NORM
            quantized = (x, gain, self._codes, self._scales)
            self._ops.append(Op(OpCode.QUANTIZE, (d, stride, matrix.width), quantized, eps, flags))
            self._ops.append(matrix.product(self._codes, self._scales, y, y_cols, epilogue, activation, after))
            return
        if gain is None:
            self._ops.append(matrix.product(x, None, y, y_cols, epilogue, activation))
            return
        normed = self._normed
        self._ops.append(Op(OpCode.RMS_NORM, (d, stride, normed.shape[1]), (x, gain, normed), eps, first))
        self._ops.append(matrix.product(normed, None, y, y_cols, epilogue, activation, after))

    def _matrix(self, prefix: str, linears: list[str], interleaved: bool = False) -> Matrix:
        order = "interleaved" if interleaved else "stacked"
        options = self._options
        how = (order, options.weight_format, options.n_threads, self._arena)
        matrix = read_matrix(self._folder, prefix, linears, *how)
        self.weight_bytes += matrix.nbytes
        return matrix

    def _gain(self, prefix: str, norm: str) -> np.ndarray:
        return self._folder.float32(f"{prefix}{norm}.weight")

    def _sub_gain(self, prefix: str, norm: str) -> np.ndarray | None:
        return self._gain(prefix, norm) if self._config.norm_placement == "sub_ln" else None


def fastest_format(folder: Folder, options: Options) -> str:
    """'i2' or 'base3', whichever decodes faster here, on these threads: a token through the first layers is timed in
    both, from memory unless the model is small."""
    config = folder.config
    weights = sum(rows * cols for rows, cols in linear_shapes(config).values())
    layers = min(config.num_hidden_layers, -(-4 * _TIMED_BYTES // weights))
    evict = weights // 4 * config.num_hidden_layers > CACHED_BYTES
    decoders = {
        name: DecoderProgram(folder, replace(options, weight_format=name, rows=1, outputs=1), layers)
        for name in ("i2", "base3")
    }
    cache = NativeCache(config, options.cache_dtype, 1)
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
