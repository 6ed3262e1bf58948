"""The state space duality of Mamba-2: a recurrence over matrices, or attention with decay, in chunks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from thrifty.errors import ThriftyError
from thrifty.ops.documents import opening

#: Tokens that are multiplied at once.
CHUNK = 256


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t (Mamba-2, arXiv 2405.21060, section 6).

    x: [batch, T, heads, p], any T; dt >= 0: [batch, T, heads]; A < 0: [heads]; B, C: [batch, T, groups, n], head h
    reads group h // (heads / groups); D: [heads]; state: [batch, heads, p, n], zeros by default. Returns y
    [batch, T, heads, p] in the dtype of x, and the state after it, float32. A token with dt = 0 leaves the state
    untouched. documents: int [batch, T], the document that a token belongs to; where one begins, the state before it is
    dropped.

    Computed in float32. Within `chunk` tokens it is attention with the weights exp(sum of A dt), from chunk to chunk
    the recurrence: T (chunk + p + n) products per head and memory in proportion to T. A single token takes the
    recurrence itself. Raises ThriftyError where shapes do not fit or chunk < 1.
    """
    _check(x, dt, A, B, C, state, chunk)
    batch, T, heads, p = x.shape
    u, step, a = x.float() * dt.float()[..., None], dt.float(), A.float()
    keys, queries = B.float(), C.float()
    h = u.new_zeros(batch, heads, p, B.shape[-1]) if state is None else state.float()
    with torch.autocast(x.device.type, enabled=False):
        if T == 1:
            y, h = _step(u, a * step, keys, queries, h)
        else:
            y, h = _chunked(u, a * step, keys, queries, h, min(chunk, T), documents)
    if D is not None:
        y = y + D.float()[:, None] * x.float()
    return y.to(x.dtype), h


def _step(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token: u = dt x [batch, 1, heads, p]; decay = A dt [batch, 1, heads]."""
    B, C = (t[:, 0].repeat_interleave(u.shape[2] // t.shape[2], 1) for t in (B, C))  # [batch, heads, n]
    h = decay[:, 0].exp()[..., None, None] * h + u[:, 0, ..., None] * B[:, :, None]
    return (h * C[:, :, None]).sum(-1)[:, None], h


def _chunked(
    u: Tensor, decay: Tensor, B: Tensor, C: Tensor, h: Tensor, chunk: int, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, T, heads, p = u.shape
    groups = B.shape[2]
    short = -T % chunk
    # Tokens that change nothing fill the last chunk; heads go beside their group.
    u = F.pad(u, (0, 0, 0, 0, 0, short)).view(batch, -1, chunk, groups, heads // groups, p)
    decay = F.pad(decay, (0, 0, 0, short)).view(batch, -1, chunk, groups, heads // groups)
    B, C = (F.pad(t, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, chunk)) for t in (B, C))
    # In float64: where much was forgotten, differences of sums are small beside the sums.
    sums = decay.double().cumsum(2).permute(0, 1, 3, 4, 2)  # [batch, chunks, groups, heads, chunk]
    # Differences are at most 0 where they are used; elsewhere exp could overflow, and with it the gradient.
    unseen = torch.ones(chunk, chunk, dtype=torch.bool, device=u.device).triu(1)
    begun = None
    if documents is not None:
        # Number of documents that began in the chunk so far: the state that a chunk meets is that of none.
        begun = F.pad(opening(documents).long(), (0, short)).unflatten(1, (-1, chunk)).cumsum(2)[:, :, None, None]
        unseen = unseen | (begun[..., :, None] != begun[..., None, :])
    weights = (sums[..., :, None] - sums[..., None, :]).float().masked_fill(unseen, -torch.inf).exp()
    weights = weights * torch.einsum("bcign,bcjgn->bcgij", C, B)[:, :, :, None]
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", weights, u)
    # What each chunk leaves in the state, and the state that each chunk meets.
    left, kept = (sums[..., -1:] - sums).float(), sums.float()
    if begun is not None:
        left = left.masked_fill(begun != begun[..., -1:], -torch.inf)
        kept = kept.masked_fill(begun > 0, -torch.inf)
    left, kept = left.exp(), kept.exp()
    added = torch.einsum("bcgrj,bcjgrp,bcjgn->bcgrpn", left, u, B)
    h = h.unflatten(1, (groups, -1))
    met = []
    for n in range(added.shape[1]):
        met.append(h)
        h = kept[:, n, :, :, -1, None, None] * h + added[:, n]
    y = y + torch.einsum("bcign,bcgrpn,bcgri->bcigrp", C, torch.stack(met, 1), kept)
    return y.reshape(batch, -1, heads, p)[:, :T], h.flatten(1, 2)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, chunk: int) -> None:
    if x.ndim != 4 or not x.shape[1] or dt.shape != x.shape[:3] or A.shape != x.shape[2:3]:
        raise ThriftyError(
            "[ssd] x must be [B, T, heads, p], T > 0, with dt [B, T, heads] and A [heads]; got "
            f"{tuple(x.shape)}, {tuple(dt.shape)} and {tuple(A.shape)}"
        )
    if B.shape != C.shape or B.ndim != 4 or B.shape[:2] != x.shape[:2] or x.shape[2] % B.shape[2]:
        raise ThriftyError(
            f"[ssd] B and C must be [B, T, groups, n], groups dividing {x.shape[2]} heads; got {tuple(B.shape)} and "
            f"{tuple(C.shape)}"
        )
    expected = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    if state is not None and state.shape != expected:
        raise ThriftyError(f"[ssd] state must be [B, heads, p, n] = {expected}; got {tuple(state.shape)}")
    if chunk < 1:
        raise ThriftyError(f"[ssd] chunk must be at least 1; got {chunk}")
