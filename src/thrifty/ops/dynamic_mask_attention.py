"""Attention over the keys that score best: an interval of queries for each key, gathered block by block."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from thrifty import native
from thrifty.errors import ThriftyError
from thrifty.ops.documents import pieces, visible

#: Floats of logits that a block may hold at once; more rows than fit are taken in turns.
_LOGITS = 1 << 22
#: Queries of a block. More share a gather and fill a product; fewer meet less that is not theirs. The fastest of 32 to
#: 384 for windows of 16, 64, 512 and 2048 alike.
_QUERIES = 160
#: What stands in a logit for a key that is not seen.
_HIDDEN = -1e30


def key_scores(v: Tensor, A: Tensor, dt_weight: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """b_j = exp(A * softplus(W_dt v_j)): what a key is worth to every query (arXiv 2412.11834).

    v: [B, kv_heads, S, d], all heads of a position side by side in v_j; A: [score_heads]; dt_weight: [score_heads,
    kv_heads * d]; dt_bias: [score_heads] or None. Returns float32 [B, score_heads, S]. Summed in float64, so that a
    score is the same however many keys are scored at once: equal keys tie in training, prefill and decode alike.
    """
    bias = None if dt_bias is None else dt_bias.double()
    dt = F.linear(v.transpose(1, 2).flatten(2).double(), dt_weight.double(), bias)  # [B, S, score_heads]
    return torch.exp(A.double() * F.softplus(dt)).float().transpose(1, 2)


def kept_until(scores: Tensor, window: int, mask: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
    """e_j: the first query position at which `window` better keys precede it, S where there is none.

    scores: [B, score_heads, S]; mask: bool [B, S] or [B, score_heads, S], False at keys that are never seen and do not
    count, whose e_j is 0; documents: int [B, S], the document that a key belongs to, in which it competes, and at whose
    end no key outlives it. Key j is active for the queries j ... e_j - 1. Returns int64 [B, score_heads, S]
    (`thrifty.spec.kept_until`). No gradient. Raises ThriftyError for a window below 1.
    """
    if mask is not None:
        scores = _hide(scores, mask)
    ends = _kept_until(scores.detach().float(), window, documents)
    return ends if mask is None else ends.masked_fill(scores == -torch.inf, 0)


def dynamic_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    window: int | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    documents: Tensor | None = None,
) -> Tensor:
    """o_t = softmax(q_t K^T / sqrt(d) + b) V over the `window` best keys up to t (arXiv 2412.11834; 2508.02124).

    q: [B, heads, T, d], the last T of S positions; k, v: [B, kv_heads, S, d]; scores b: [B, score_heads, S], with
    score_heads kv_heads, or heads where each keeps keys of its own; mask: bool [B, S] or [B, score_heads, S], False at
    padding, which is never seen and takes no place among the best. window=None keeps every key. Of equal scores the
    newer key is kept. A query without any key gives zeros. documents: int [B, S] instead of a mask, the document that
    each of S = T tokens belongs to: a query chooses among its own. Returns [B, heads, T, d] in the dtype of q.

    Where keys are evicted, memory and time are linear in S: blocks of queries gather the at most window + block keys
    that any of them sees, in the backward again. Where none is, the score becomes one more feature of the key
    and the rest is plain causal attention. Gradients flow to q, k, v and scores.
    Raises ThriftyError for shapes that do not fit and a window below 1.
    """
    _check(q, k, v, scores, window, mask, documents)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    if scores.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(scores.shape[1] // t.shape[1], dim=1) for t in (k, v))
    T, S = q.shape[2], k.shape[2]
    if mask is not None:
        scores = _hide(scores, mask)
    if (window is None or window >= S) and T in (1, S):
        y = _one(q, k, v, scores, dropout) if T == 1 else _dense(q, k, v, scores, dropout, documents)
        return y if mask is None else _clear_keyless(y, scores)
    seed = int(torch.randint(1 << 62, ())) if dropout else 0
    window = min(window or S, S)
    ends = kept_until(scores, window, mask, documents)
    return _sparse(q, k, v, scores.float(), ends, window, dropout, seed)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    window: int | None,
    mask: Tensor | None,
    documents: Tensor | None,
) -> None:
    op = "[dynamic_mask_attention]"
    (B, heads, T, d), (kv_heads, S) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != d or heads % kv_heads or T > S:
        raise ThriftyError(
            f"{op} q, k and v must be [B, heads, T, d] and twice [B, kv_heads, S, d], heads a multiple of kv_heads; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if scores.shape not in ((B, kv_heads, S), (B, heads, S)):
        raise ThriftyError(
            f"{op} scores must be [B, score_heads, S], score_heads {kv_heads} or {heads}; got {tuple(scores.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((B, S), scores.shape)):
        raise ThriftyError(
            f"{op} mask must be bool {(B, S)} or {tuple(scores.shape)}, False at padding; got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    if documents is not None and (mask is not None or T != S or documents.shape != (B, S)):
        raise ThriftyError(
            f"{op} documents must be [B, S] = {(B, S)} of T = S tokens without a mask; got {tuple(documents.shape)}, "
            f"{T} queries and {'no' if mask is None else 'a'} mask"
        )
    if window is not None and window < 1:
        raise ThriftyError(f"{op} window must be at least 1; got {window}; None keeps every key")


def _hide(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~(mask[:, None] if mask.ndim == 2 else mask), -torch.inf)


def _one(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, dropout: float) -> Tensor:
    """One query a head, over every key: the heads of a group are the rows of a product."""
    rows = q.reshape(*k.shape[:2], -1, q.shape[3])
    logits = (rows * q.shape[3] ** -0.5 @ k.transpose(2, 3)).float() + scores.float().clamp(min=_HIDDEN)[:, :, None]
    p = F.dropout(torch.softmax(logits, -1), dropout)
    return (p.to(v.dtype) @ v).reshape(q.shape)


def _dense(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, dropout: float, documents: Tensor | None) -> Tensor:
    """Every key up to t: q' = [q, 1, 0 ...], k' = [k, sqrt(d) b, 0 ...], v' = [v, 0 ...], the scale that of q."""
    d = q.shape[-1]
    # A key without weight is far below the others, not at -inf, which would be NaN where it meets nothing else.
    bias = (scores.double() * d**0.5).clamp(min=torch.finfo(q.dtype).min / 2)
    parts = [bias.to(q.dtype)]
    if q.dtype != torch.float32:  # what one number cannot hold of the score, two more do
        for _ in range(2):
            parts.append((bias - sum(part.double() for part in parts)).detach().to(q.dtype))
    n = len(parts)
    ones = F.pad(q.new_ones(*q.shape[:3], n), (0, -(d + n) % 8))
    q = torch.cat([q, ones], -1)
    k = torch.cat([k, F.pad(torch.stack(parts, -1), (0, -(d + n) % 8))], -1)
    v = F.pad(v, (0, k.shape[-1] - d))
    y = F.scaled_dot_product_attention(
        *(q, k, v, None if documents is None else visible(documents)),
        dropout_p=dropout,
        is_causal=documents is None,
        scale=d**-0.5,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y[..., :d]


@torch.library.custom_op("thrifty::kept_until", mutates_args=())
def _kept_until(scores: Tensor, window: int, documents: Tensor | None = None) -> Tensor:
    if documents is None:
        rows = scores.reshape(-1, scores.shape[-1]).cpu().contiguous()
        return torch.from_numpy(native.kept_until(rows.numpy(), window)).view(scores.shape).to(scores.device)
    on_cpu = scores.cpu()
    ends = torch.empty_like(on_cpu, dtype=torch.int64, memory_format=torch.contiguous_format)
    for row, at in pieces(documents, len(on_cpu)):
        one = on_cpu[row, :, at].contiguous()
        ends[row, :, at] = torch.from_numpy(native.kept_until(one.numpy(), window)).add_(at.start)
    return ends.to(scores.device)


@_kept_until.register_fake
def _(scores: Tensor, window: int, documents: Tensor | None = None) -> Tensor:
    return torch.empty_like(scores, dtype=torch.int64, memory_format=torch.contiguous_format)


class _Block(NamedTuple):
    """Queries start ... end of some rows, and the keys that any of them sees; a row is a score head of a sequence."""

    start: int
    end: int
    keys: Tensor  # [R * U] among the keys of these rows, laid end to end
    bias: Tensor  # [R, 1, end - start, U]: the key's score, or a number far below where it is not seen


def _blocks(ends: Tensor, scores: Tensor, T: int, window: int) -> Iterator[_Block]:
    """The last T queries in blocks. ends, scores: [R, S].

    A key that a block sees precedes it and is still active at its start, or is in it: the survivors of one block are
    found among its own keys, in the order of their positions. Where a row has fewer, S stands for no key.
    """
    R, S = scores.shape
    positions = torch.arange(S, device=scores.device)
    rows = torch.arange(R, device=scores.device)[:, None] * S
    ends, scores = F.pad(ends, (0, 1)), F.pad(scores.clamp(min=_HIDDEN), (0, 1))
    # Arithmetic on floats is twice as fast as choosing by a boolean: 0 where a key is seen, far below where it is not.
    past_end = torch.arange(1, _QUERIES + 1, device=scores.device).float()[:, None] * _HIDDEN
    future = scores.new_full((_QUERIES, _QUERIES), _HIDDEN).triu(1)
    keys, until = positions[: S - T].expand(R, -1), ends[:, : S - T]
    for start in range(S - T, S, _QUERIES):
        end = min(start + _QUERIES, S)
        n = end - start
        past = keys.masked_fill(until <= start, S).sort(-1).values[:, :window]
        keys = torch.cat([past, positions[start:end].expand(R, n)], -1)  # [R, U]
        until = ends.gather(1, keys)
        left = (until - start).clamp(0, n).float() * _HIDDEN
        bias = (past_end[:n] - left[:, None]).clamp_(max=0)
        bias[..., -n:] += future[:n, :n]
        bias += scores.gather(1, keys)[:, None]
        yield _Block(start - (S - T), end - (S - T), (keys % S + rows).flatten(), bias[:, None])


class _Rows(NamedTuple):
    """The rows of a turn: q [R, G, T, d], the G heads that share keys; k, v [R * S, d]; scores, ends [R, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    ends: Tensor
    dropout: float
    generator: torch.Generator | None

    def probabilities(self, block: _Block) -> tuple[Tensor, ...]:
        """Scaled q [R, G n, d], gathered k, v [R, U, d], p float32 [R, G n, U], and by what dropout multiplies p."""
        R, _, _, d = self.q.shape
        q = (self.q[:, :, block.start : block.end] * d**-0.5).flatten(1, 2)
        k, v = (t.index_select(0, block.keys).view(R, -1, d) for t in (self.k, self.v))
        logits = torch.bmm(q, k.transpose(1, 2)).float()
        logits.view(R, -1, *block.bias.shape[2:]).add_(block.bias)
        p = _softmax(logits)
        if self.generator is None:
            return q, k, v, p, p.new_ones(())
        kept = torch.rand(p.shape, generator=self.generator, device=p.device) >= self.dropout
        return q, k, v, p, kept / (1 - self.dropout)


def _softmax(logits: Tensor) -> Tensor:
    """softmax(logits [..., U]), in their place, with zeros for weights below 1e-30 of the largest.

    No float32 sum notices those, but products with denormal numbers take thirty times as long, and so many logits that
    lie far below the largest (the hidden keys') cost `exp` more than all others.
    """
    p = logits.sub_(logits.amax(-1, keepdim=True)).clamp_(min=-69.3).exp_()
    F.threshold(p, 1e-30, 0, inplace=True)
    return p.div_(p.sum(-1, keepdim=True))


def _turns(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ends: Tensor, window: int, dropout: float, seed: int
) -> Iterator[tuple[slice, _Rows]]:
    """Rows in turns that fit `_LOGITS`, each with the numbers that dropout draws, the same in forward and backward."""
    (B, kv_heads, S, d), T = k.shape, q.shape[2]
    q = q.reshape(B * kv_heads, -1, T, d)
    k, v, scores, ends = k.reshape(-1, S, d), v.reshape(-1, S, d), scores.reshape(-1, S), ends.reshape(-1, S)
    step = max(1, _LOGITS // (q.shape[1] * _QUERIES * (window + _QUERIES)))
    for first in range(0, len(k), step):
        turn = slice(first, first + step)
        generator = torch.Generator(q.device).manual_seed(seed + first) if dropout else None
        keys, values = k[turn].flatten(0, 1), v[turn].flatten(0, 1)
        yield turn, _Rows(q[turn], keys, values, scores[turn], ends[turn], dropout, generator)


@torch.library.custom_op("thrifty::dynamic_mask_attention", mutates_args=())
def _sparse(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ends: Tensor, window: int, dropout: float, seed: int
) -> Tensor:
    T, d = q.shape[2:]
    y = q.new_empty(q.shape)
    rows_of_y = y.view(-1, q.shape[1] // k.shape[1], T, d)
    for turn, rows in _turns(q, k, v, scores, ends, window, dropout, seed):
        for block in _blocks(rows.ends, rows.scores, T, window):
            _, _, values, p, kept = rows.probabilities(block)
            mixed = torch.bmm((p if rows.generator is None else p * kept).to(v.dtype), values)
            rows_of_y[turn, :, block.start : block.end] = mixed.view(len(mixed), -1, block.end - block.start, d)
    return _without_keyless(y, scores)


@_sparse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ends: Tensor, window: int, dropout: float, seed: int) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("thrifty::dynamic_mask_attention_backward", mutates_args=())
def _sparse_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    ends: Tensor,
    window: int,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (S, d), T = k.shape[2:], q.shape[2]
    grad = _without_keyless(grad, scores).reshape(-1, q.shape[1] // k.shape[1], T, d)
    dq = q.new_empty(grad.shape)
    dk, dv = (k.new_zeros(len(grad), S, d, dtype=torch.float32) for _ in range(2))
    db = scores.new_zeros(len(grad), S)
    for turn, rows in _turns(q, k, v, scores, ends, window, dropout, seed):
        sums = [t[turn].flatten(0, 1) for t in (dk, dv, db)]
        for block in _blocks(rows.ends, rows.scores, T, window):
            queries, keys, values, p, kept = rows.probabilities(block)
            g = grad[turn, :, block.start : block.end].flatten(1, 2)
            dropped = p if rows.generator is None else p * kept
            dvalues = torch.bmm(dropped.to(g.dtype).transpose(1, 2), g)
            dp = torch.bmm(g, values.transpose(1, 2)).float()
            dlogits = torch.ops.aten._softmax_backward_data(dp if rows.generator is None else dp * kept, p, -1, p.dtype)
            small = dlogits.to(g.dtype)
            dqueries = torch.bmm(small, keys).mul_(d**-0.5)
            dq[turn, :, block.start : block.end] = dqueries.view(len(g), -1, block.end - block.start, d)
            dkeys = torch.bmm(small.transpose(1, 2), queries)
            for total, part in zip(sums, (dkeys, dvalues, dlogits.sum(1)), strict=True):
                total.index_add_(0, block.keys, part.float().flatten(0, 1))
    return dq.view(q.shape), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), db.view(scores.shape)


@_sparse_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    ends: Tensor,
    window: int,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), scores.new_empty(scores.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.dropout, ctx.seed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    options = ctx.window, ctx.dropout, ctx.seed
    return *_sparse_backward(grad, *ctx.saved_tensors, *options), None, None, None, None


_sparse.register_autograd(_backward, setup_context=_setup)


def _without_keyless(x: Tensor, scores: Tensor) -> Tensor:
    """x [B, heads, T, d] with zeros at the queries that have no key."""
    if not torch.isneginf(scores).any():
        return x
    return _clear_keyless(x, scores)


def _clear_keyless(x: Tensor, scores: Tensor) -> Tensor:
    keyless = torch.isneginf(scores).logical_not().cumsum(-1)[..., -x.shape[2] :] == 0  # [B, score_heads, T]
    return x.masked_fill(keyless.repeat_interleave(x.shape[1] // scores.shape[1], dim=1)[..., None], 0)
