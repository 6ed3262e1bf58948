"""Routed experts beside a shared feed-forward, as native ops."""

from typing import TYPE_CHECKING

import numpy as np

from thrifty.errors import ThriftyError
from thrifty.native import ACTIVATION_IDS, DTYPE_IDS, MOST_CHOSEN, Op, OpCode
from thrifty.runtime.weights import float_matrix

if TYPE_CHECKING:
    from thrifty.runtime.program import DecoderProgram


def add_experts(program: "DecoderProgram", layer: int) -> None:
    """x = b * x + (down(inner) + experts(z)), z = post_attention_layernorm(x): the end of a layer."""
    c, rows = program.config, program.options.rows
    experts, hidden = c.experts, c.hidden_size
    if experts is None or experts.per_head > MOST_CHOSEN:
        raise ThriftyError(f"[load] num_experts_per_tok must be at most {MOST_CHOSEN}; got {experts}; run it in torch")
    normed, shared = (np.zeros((rows, hidden), np.float32) for _ in range(2))
    norm = (program.x, program.gain(layer, "post_attention_layernorm"), normed)
    program.ops.append(Op(OpCode.RMS_NORM, (hidden, hidden, hidden), norm, (c.rms_norm_eps,)))
    scores = np.zeros((rows, 2 * experts.heads * experts.keys), np.float32)
    if experts.router == "linear":
        program.product(program.dense(layer, "mlp.router_gate"), normed, None, scores, scores.shape[1])
    else:
        _score_keys(program, layer, normed, scores)
    program.linears(layer, ["mlp.down_proj"], None, program.inner, shared)
    tables = [program.folder.tensors[f"model.layers.{layer}.mlp.{name}_embed.weight"] for name in ("down", "up")]
    dtypes = {table.dtype for table in tables}
    dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= DTYPE_IDS.keys() else "F32"
    data = [table.data if table.dtype == dtype else table.float32() for table in tables]
    chosen = experts.heads * experts.per_head
    scratch = np.zeros((rows, 4 * chosen + hidden + hidden % 2), np.float32)
    program.weight_bytes += 2 * chosen * hidden * data[0].itemsize
    sizes = (experts.heads, experts.per_head, experts.keys, hidden, DTYPE_IDS[dtype], ACTIVATION_IDS[c.hidden_act])
    factors = program.factors(layer, "post_attention_residual")
    buffers = (normed, scores, *data, shared, program.x, factors, scratch)
    numbers = (*sizes, experts.norm_topk_prob, hidden, scratch.shape[1])
    program.ops.append(Op(OpCode.EXPERTS, numbers, buffers))


def _score_keys(program: "DecoderProgram", layer: int, normed: np.ndarray, scores: np.ndarray) -> None:
    """Scores [rows, 2, heads, n]: q . k for each half p of a head's key, q the queries [rows, 2, heads, r]."""
    matrix = program.dense(layer, "mlp.queries")
    queries = np.zeros((len(normed), matrix.rows), np.float32)
    program.product(matrix, normed, None, queries, matrix.rows)
    keys = program.values(layer, "mlp.keys")  # [heads, n, 2, r]
    heads, n, _, r = keys.shape
    for p in range(2):
        for head in range(heads):
            part = p * heads + head
            half = float_matrix(keys[head, :, p], program.arena)
            program.weight_bytes += half.nbytes
            program.product(half, queries[:, part * r :], None, scores[:, part * n :], n)
