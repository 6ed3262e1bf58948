"""The recurrence of the matmul-free language model: a forget gate, a candidate, nothing between features."""

import math

import torch
from torch import Tensor

from thrifty.errors import ThriftyError
from thrifty.ops.dispatch import is_evaluation
from thrifty.ops.documents import opening


def mlgru(f: Tensor, c: Tensor, state: Tensor | None = None, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = f_t * h_{t-1} + (1 - f_t) * c_t, elementwise (MatMul-free LM, arXiv 2406.02528, section 3.3.1).

    f: forget gates in [0, 1], [B, T, d]; c: candidates [B, T, d]; state: h_{-1} [B, d], zeros by default. Returns h
    [B, T, d] in the dtype of c, and the state after it, h_{T-1}, float32 [B, d]. A gate of 1 keeps the state untouched.
    documents: int [B, T], the document that a token belongs to; where one begins, the state before it is dropped.

    Computed in float32. T tokens are cut into about sqrt(T) chunks that run side by side, token by token, and are then
    joined in order: 2 sqrt(T) steps, products of gates only, so a gate of 0 is as good as any. Evaluated without
    gradients in float32 on a CPU, it goes token by token, with the bits of the runtime: what follows is quantised.
    Raises ThriftyError where the shapes do not fit.
    """
    if f.shape != c.shape or f.ndim != 3 or not f.shape[1]:
        raise ThriftyError(f"[mlgru] f and c must be [B, T, d], T > 0; got {tuple(f.shape)} and {tuple(c.shape)}")
    if state is not None and state.shape != (f.shape[0], f.shape[2]):
        raise ThriftyError(f"[mlgru] state must be [B, d] = {(f.shape[0], f.shape[2])}; got {tuple(state.shape)}")
    gates, added = f.float(), (1 - f.float()) * c.float()
    if documents is not None:
        gates = gates.masked_fill(opening(documents)[..., None], 0.0)
    start = torch.zeros_like(gates[:, 0]) if state is None else state.float()
    if is_evaluation(f):
        steps = [start]
        for gate, new in zip(gates.unbind(1), added.unbind(1), strict=True):
            steps.append(gate * steps[-1] + new)
        return torch.stack(steps[1:], 1), steps[-1]
    h: Tensor = _LinearRecurrence.apply(gates, added, start)  # pyright: ignore
    return h.to(c.dtype), h[:, -1]


class _LinearRecurrence(torch.autograd.Function):
    """h_t = f_t * h_{t-1} + b_t. Kept for the backward: f and h; it is the same recurrence, run from the end."""

    @staticmethod
    def forward(ctx, f, b, start):
        h = _scan(f, b, start)
        ctx.save_for_backward(f, h, start)
        return h

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        f, h, start = ctx.saved_tensors
        # g_t = grad_t + f_{t+1} g_{t+1}
        later = torch.cat([f[:, 1:], torch.zeros_like(f[:, :1])], 1)
        g = _scan(later.flip(1), grad.flip(1), torch.zeros_like(start)).flip(1)
        before = torch.cat([start[:, None], h[:, :-1]], 1)
        return g * before, g, f[:, 0] * g[:, 0]


def _scan(f: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """h_t = f_t * h_{t-1} + b_t for [B, T, d] and h_{-1} = start [B, d]."""
    T = f.shape[1]
    if T == 1:
        return f * start[:, None] + b
    chunk = math.isqrt(T - 1) + 1
    padding = (0, 0, 0, -T % chunk)
    # Steps that change nothing fill the last chunk.
    f = torch.nn.functional.pad(f, padding, value=1.0).unflatten(1, (-1, chunk))  # [B, chunks, chunk, d]
    b = torch.nn.functional.pad(b, padding).unflatten(1, (-1, chunk))
    gates, values = [f[:, :, 0]], [b[:, :, 0]]
    for t in range(1, chunk):
        gates.append(gates[-1] * f[:, :, t])
        values.append(f[:, :, t] * values[-1] + b[:, :, t])
    kept, own = torch.stack(gates, 2), torch.stack(values, 2)
    starts = [start]
    for n in range(f.shape[1] - 1):
        starts.append(kept[:, n, -1] * starts[-1] + own[:, n, -1])
    return (kept * torch.stack(starts, 1)[:, :, None] + own).flatten(1, 2)[:, :T]
