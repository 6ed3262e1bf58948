"""The token mixers of a layer as native ops."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from thrifty.checkpoint.names import GATE_BOUNDS
from thrifty.native import ACTIVATION_IDS, DTYPE_IDS, Epilogue, Op, OpCode
from thrifty.runtime.weights import row_stride, tiles_of
from thrifty.spec import gate_bounds
from thrifty.spec.formats import TILE_ROWS

if TYPE_CHECKING:
    from thrifty.runtime.program import DecoderProgram


def _padded(width: int) -> int:
    return TILE_ROWS * tiles_of(width)


def _project(
    program: "DecoderProgram",
    layer: int,
    linears: str,
    out: np.ndarray,
    epilogue: Epilogue = Epilogue.STORE,
    act: int = 0,
) -> None:
    """Linears `{letter}_proj` of the normed residual stream, side by side in `out`, each padded to whole tiles."""
    names = [f"self_attn.{x}_proj" for x in linears]
    program.linears(layer, names, "input_layernorm", program.x, out, epilogue, act)


def _heads(program: "DecoderProgram", layer: int, qkv: np.ndarray, norms: bool, rotary: bool) -> None:
    """Norms, then rotary positions, of queries and keys where they lie."""
    c = program.config
    gains = [program.gain(layer, f"self_attn.{x}_norm") if norms else None for x in "qk"]
    tables = (program.rope.cos, program.rope.sin) if rotary else (None, None)
    sizes = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, qkv.shape[1], _padded(c.q_size))
    program.ops.append(Op(OpCode.HEADS, sizes, (qkv, *tables, *gains), (c.rms_norm_eps,)))


def _finish(program: "DecoderProgram", layer: int, mixed: np.ndarray) -> None:
    program.add(layer, "self_attn.o_proj", "self_attn.attn_sub_norm", mixed, "input_residual")


def _attention(program: "DecoderProgram", layer: int) -> None:
    c, scratch = program.config, program.scratch
    k = _padded(c.q_size)
    v = k + _padded(c.kv_size)
    qkv, attended = program.projected(v + _padded(c.kv_size)), program.mixed(c.q_size)
    _project(program, layer, "qkv", qkv)
    if c.attention_qk_norm:
        _heads(program, layer, qkv, norms=True, rotary=False)
    number, dtype = program.layout.number(layer), DTYPE_IDS[program.layout.dtype]
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, number, dtype, qkv.shape[1])
    program.ops.append(Op(OpCode.ROPE_CACHE, (*heads, k, v), (qkv, program.rope.cos, program.rope.sin)))
    sizes, buffers = (*heads, c.q_size, scratch.size), (qkv, attended, scratch)
    program.ops.append(Op(OpCode.ATTENTION, sizes, buffers, (c.head_dim**-0.5,)))
    _finish(program, layer, attended)


def _dynamic_mask(program: "DecoderProgram", layer: int) -> None:
    c = program.config
    k = _padded(c.q_size)
    v = k + _padded(c.kv_size)
    qkv, attended = program.projected(v + _padded(c.kv_size)), program.mixed(c.q_size)
    _project(program, layer, "qkv", qkv)
    _heads(program, layer, qkv, norms=c.qk_norm, rotary=True)
    scores = np.zeros((len(qkv), c.score_heads), np.float32)
    A, weight = (program.values(layer, f"self_attn.{name}") for name in ("A", "dt_proj.weight"))
    bias = program.values(layer, "self_attn.dt_proj.bias") if c.attention_bias else None
    sizes = (c.kv_size, c.score_heads, qkv.shape[1])
    program.ops.append(Op(OpCode.KEY_SCORES, sizes, (qkv[:, v:], A, weight, bias, scores)))
    dtype, number = DTYPE_IDS[program.layout.dtype], program.layout.number(layer)
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.score_heads, c.window or 0)
    sizes = (*heads, dtype, qkv.shape[1], number, program.layout.at(layer))
    buffers = (qkv, qkv[:, k:], qkv[:, v:], scores, attended)
    program.ops.append(Op(OpCode.DYNAMIC_MASK, sizes, buffers, (c.head_dim**-0.5,)))
    _finish(program, layer, attended)


def _mlgru(program: "DecoderProgram", layer: int) -> None:
    d = program.config.hidden_size
    part = _padded(d)
    gates, mixed = program.projected(3 * part), program.mixed(d)
    _project(program, layer, "fg", gates[:, : 2 * part], Epilogue.ACT, ACTIVATION_IDS["sigmoid"])
    _project(program, layer, "c", gates[:, 2 * part :], Epilogue.ACT, ACTIVATION_IDS["silu"])
    sizes = (d, gates.shape[1], d, program.layout.at(layer))
    buffers = (gates, gates[:, 2 * part :], gates[:, part:], mixed)
    program.ops.append(Op(OpCode.MLGRU, sizes, buffers))
    _finish(program, layer, mixed)


def _hgrn(program: "DecoderProgram", layer: int) -> None:
    c, d = program.config, program.config.hidden_size
    part = _padded(d)
    gates, mixed = program.projected(3 * part), program.mixed(d)
    f, g, i = (gates[:, part * at : part * (at + 1)] for at in range(3))
    _project(program, layer, "f", f, Epilogue.ACT, ACTIVATION_IDS["sigmoid"])
    _project(program, layer, "g", g)
    _project(program, layer, "i", i, Epilogue.ACT, ACTIVATION_IDS["silu"])
    gain = program.gain(layer, "self_attn.g_norm")
    program.ops.append(Op(OpCode.HEADS, (1, 0, d, row_stride(g)), (g, None, None, gain), (c.rms_norm_eps,)))
    bounds = gate_bounds(program.folder.float32(GATE_BOUNDS))[layer].copy() if c.gate_bounds else None
    sizes = (d, row_stride(f), d, program.layout.at(layer), 1)
    program.ops.append(Op(OpCode.MLGRU, sizes, (f, i, g, mixed, bounds)))
    _finish(program, layer, mixed)


def _ssd(program: "DecoderProgram", layer: int) -> None:
    c, rope, heads = program.config, program.rope, program.config.num_attention_heads
    part = _padded(c.q_size)
    xbc, mixed = program.projected(3 * part), program.mixed(c.q_size)
    _project(program, layer, "xbc", xbc)
    b, state_c = xbc[:, part:], xbc[:, 2 * part :]
    if c.ssd_rotary:
        program.ops.append(Op(OpCode.HEADS, (heads, heads, c.head_dim, xbc.shape[1], part), (b, rope.cos, rope.sin)))
    dt = np.zeros((len(xbc), heads), np.float32)
    step = program.dense(layer, "self_attn.dt_proj")
    program.product(step, program.x, program.gain(layer, "input_layernorm"), dt, heads)
    A = (-np.exp(program.values(layer, "self_attn.A_log").astype(np.float64))).astype(np.float32)
    sizes = (heads, heads, c.head_dim, c.head_dim, row_stride(xbc), heads, c.q_size, program.layout.at(layer))
    program.ops.append(Op(OpCode.SSD, sizes, (xbc, b, state_c, dt, A, mixed)))
    _finish(program, layer, mixed)


#: By the names in `DecoderConfig.mixers`.
MIXERS: dict[str, Callable[["DecoderProgram", int], None]] = {
    "attention": _attention,
    "dynamic_mask": _dynamic_mask,
    "mlgru": _mlgru,
    "hgrn": _hgrn,
    "ssd": _ssd,
}
