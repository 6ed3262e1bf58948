"""h_t = a_t h_{t-1} + b_t for all steps at once: what is left of a recurrence without hidden-to-hidden products."""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops


def real_product(a: Any, h: Any) -> Any:
    """a * h, elementwise."""
    return a * h


def complex_product(a: Any, h: Any) -> Any:
    """a * h, elementwise, of complex numbers as pairs of reals: [..., 2, n]."""
    real, imaginary = a[..., 0, :], a[..., 1, :]
    return ops.stack(
        [
            real * h[..., 0, :] - imaginary * h[..., 1, :],
            real * h[..., 1, :] + imaginary * h[..., 0, :],
        ],
        axis=-2,
    )


def _conjugate(a: Any) -> Any:
    return ops.stack([a[..., 0, :], -a[..., 1, :]], axis=-2)


def _linear_recurrence(product: Callable[[Any, Any], Any], conjugate: Callable[[Any], Any]) -> Callable[..., Any]:
    def step(h, at):
        h = product(at[0], h) + at[1]
        return h, h

    def steps(decay, update, start):
        at = decay, update
        if decay.shape[0] is None:  # TensorFlow; Keras scans several arrays only where their length is known
            at = ops.stack(at, 1)
        return ops.scan(step, start, at)[1]

    def chunk_step(carry, at):
        decay, update = at
        carry = (product(decay, carry[0]), product(decay, carry[1]) + update)
        return carry, carry

    def chunks(decay, update, start):
        """About sqrt(T) chunks run side by side, step by step, and are then joined in order: 2 sqrt(T) steps."""
        length = decay.shape[0]
        size = math.isqrt(length - 1) + 1
        count = -(-length // size)
        padding = [(0, count * size - length), *[(0, 0)] * (len(decay.shape) - 1)]

        def cut(x):
            return ops.moveaxis(ops.reshape(ops.pad(x, padding), (count, size, *x.shape[1:])), 1, 0)

        decay, update = cut(decay), cut(update)  # [size, count, ...]
        if size == 1:
            kept, own = decay, update
        else:
            first = (decay[0], update[0])
            _, (kept, own) = ops.scan(chunk_step, first, (decay[1:], update[1:]))
            kept, own = ops.concatenate([first[0][None], kept]), ops.concatenate([first[1][None], own])
        ends = steps(kept[-1], own[-1], start)
        starts = ops.concatenate([start[None], ends[:-1]])
        h = product(kept, starts[None]) + own
        return ops.reshape(ops.moveaxis(h, 0, 1), (count * size, *h.shape[2:]))[:length]

    def states(decay, update, start):
        # A compiled loop goes through memory once, which is as fast as memory is; torch pays for each step it takes.
        if keras.config.backend() == "torch":
            return chunks(decay, update, start)
        return steps(decay, update, start)

    @ops.custom_gradient
    def recurrence(decay, update, start):
        h = states(decay, update, start)
        # Detached: torch would otherwise keep the result alive through its own gradient.
        kept = ops.stop_gradient(h)

        def gradient(*args, upstream=None):
            # g_t = upstream_t + conj(a_{t+1}) g_{t+1}: the same recurrence, from the end.
            grad = args[0] if upstream is None else upstream
            turned = conjugate(decay)
            later = ops.concatenate([turned[1:], ops.zeros_like(turned[:1])])
            g = ops.flip(states(ops.flip(later, 0), ops.flip(grad, 0), ops.zeros_like(start)), 0)
            before = ops.concatenate([start[None], kept[:-1]])
            return product(conjugate(before), g), g, product(turned[0], g[0])

        return h, gradient

    return recurrence


#: h_t = a_t * h_{t-1} + b_t for arrays [T, ...], time first, of one shape and floating type, and h_{-1} [...].
#: Returns h [T, ...]. Its gradient is the same recurrence run from the end, so that only a and h are kept for it.
real_recurrence = _linear_recurrence(real_product, lambda a: a)

#: As `real_recurrence`, with complex numbers as pairs of reals: [T, ..., 2, n].
complex_recurrence = _linear_recurrence(complex_product, _conjugate)
