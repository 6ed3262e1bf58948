from typing import Any

import numpy as np
import pytest
import torch

from thrifty import ops, spec
from thrifty.errors import ThriftyError

LENGTHS = (1, 2, 3, 63, 64, 257, 500)


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    tolerance = spec.TOLERANCES["float32"] * max(np.abs(expected).max(), 1e-30)
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


def mlgru_inputs(T: int, d: int = 5, batch: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    f = rng.uniform(size=(batch, T, d)).astype(np.float32)
    # Gates that are shut and open, for long and at once.
    f[:, ::3], f[0, 1:7, 0], f[1, :, 1] = 0, 1e-30, 1
    return f, rng.standard_normal((batch, T, d)).astype(np.float32), rng.standard_normal((batch, d)).astype(np.float32)


def ssd_inputs(T: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Two rows of 4 heads in 2 groups, p = 3, n = 5; steps from tiny to ones that forget everything."""
    rng = np.random.default_rng(seed)
    arrays = {
        "x": rng.standard_normal((2, T, 4, 3)),
        "dt": np.exp(rng.uniform(-6, 4, (2, T, 4))),
        "A": -rng.uniform(0.01, 16, 4),
        "B": rng.standard_normal((2, T, 2, 5)),
        "C": rng.standard_normal((2, T, 2, 5)),
        "D": rng.standard_normal(4),
        "state": rng.standard_normal((2, 4, 3, 5)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def torch_ssd(arrays: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.ssd(**{name: torch.as_tensor(array) for name, array in arrays.items()}, **options)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("carried", [False, True])
def test_mlgru_is_the_specs(T, carried):
    f, c, state = mlgru_inputs(T)
    h, last = ops.mlgru(torch.from_numpy(f), torch.from_numpy(c), torch.from_numpy(state) if carried else None)
    expected = np.stack([spec.mlgru(f[b], c[b], state[b] if carried else None) for b in range(2)])
    close(h, expected)
    close(last, expected[:, -1])


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_ssd_is_the_specs(T, carried, chunk):
    arrays = ssd_inputs(T)
    if not carried:
        del arrays["state"]
    y, last = torch_ssd(arrays, chunk=chunk)
    per_row = [spec.ssd(**{n: a if n in "AD" else a[b] for n, a in arrays.items()}) for b in range(2)]
    close(y, np.stack([row[0] for row in per_row]))
    close(last, np.stack([row[1] for row in per_row]))


def test_steps_equal_the_whole():
    f, c, _ = mlgru_inputs(63)
    whole, _ = ops.mlgru(torch.from_numpy(f), torch.from_numpy(c))
    state, steps = None, []
    for t in range(63):
        h, state = ops.mlgru(torch.from_numpy(f[:, t : t + 1]), torch.from_numpy(c[:, t : t + 1]), state)
        steps.append(h)
    close(torch.cat(steps, 1), whole.numpy())
    arrays = ssd_inputs(63)
    expected, _ = torch_ssd(arrays, chunk=16)
    ends, parts = torch.from_numpy(arrays["state"]), []
    for t in range(63):
        now = {n: a if n in "AD" else a[:, t : t + 1] for n, a in arrays.items() if n != "state"}
        y, ends = torch_ssd({**now, "state": ends})
        parts.append(y)
    close(torch.cat(parts, 1), expected.numpy())


@pytest.mark.parametrize("T", [1, 7, 40])
def test_gradients_are_those_of_the_recurrence(T):
    f, c, state = (torch.from_numpy(a).double().requires_grad_() for a in mlgru_inputs(T, batch=2))
    weight = torch.randn(2, T, 5, generator=torch.Generator().manual_seed(0))

    def loop(f, c, h):
        out = []
        for t in range(T):
            h = f[:, t] * h + (1 - f[:, t]) * c[:, t]
            out.append(h)
        return torch.stack(out, 1), h

    results = []
    runs: list[Any] = [loop, ops.mlgru]
    for run in runs:
        h, last = run(f, c, state)
        results.append(torch.autograd.grad((h * weight).sum() + last.sum(), (f, c, state)))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 7, 40])
def test_ssds_gradients_are_finite_and_do_not_depend_on_the_chunk(T):
    results = []
    for chunk in (1, 16):
        tensors = {n: torch.from_numpy(a).requires_grad_() for n, a in ssd_inputs(T).items()}
        y, last = ops.ssd(**tensors, chunk=chunk)
        results.append(torch.autograd.grad(y.square().sum() + last.sum(), tuple(tensors.values())))
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_a_documents_state_begins_at_zero(chunk):
    """Several documents in a chunk, one over several, and one that begins where a chunk does; the first goes on."""
    lengths = (1, 2, 13, 40, 1, 7)
    documents = torch.repeat_interleave(torch.tensor([4, 0, 4, 1, 3, 2]), torch.tensor(lengths)).expand(2, -1)
    arrays = ssd_inputs(64)
    # What earlier documents leave is larger than all that follows.
    arrays["x"][:, :56] *= 1e4
    ssd_state = torch.from_numpy(arrays.pop("state")).requires_grad_()
    tensors = {n: torch.from_numpy(a).requires_grad_() for n, a in arrays.items()}
    f, c, state = (torch.from_numpy(a).requires_grad_() for a in mlgru_inputs(64))
    packed = *ops.ssd(**tensors, state=ssd_state, chunk=chunk, documents=documents), *ops.mlgru(f, c, state, documents)
    parts = []
    pieces = [t.split(lengths, 1) for n, t in (tensors | {"f": f, "c": c}).items() if n not in "AD"]
    for i, (x, dt, B, C, gates, candidates) in enumerate(zip(*pieces, strict=True)):
        y = ops.ssd(x, dt, tensors["A"], B, C, tensors["D"], None if i else ssd_state, chunk)
        parts.append((*y, *ops.mlgru(gates, candidates, None if i else state)))
    alone = [torch.cat([p[n] for p in parts], 1) if n in (0, 2) else parts[-1][n] for n in range(4)]
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for t in alone]
    leaves = (*tensors.values(), f, c, state, ssd_state)
    for got, want in zip(
        (*packed, *torch.autograd.grad(packed, leaves, weights)),
        (*alone, *torch.autograd.grad(alone, leaves, weights)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(want.abs().max().item(), 1))


@pytest.mark.parametrize("t", [0, 5, 16, 39])
def test_the_past_knows_nothing_of_the_future(t):
    arrays = ssd_inputs(40)
    f, c, _ = mlgru_inputs(40)
    y, h = torch_ssd(arrays, chunk=16)[0], ops.mlgru(torch.from_numpy(f), torch.from_numpy(c))[0]
    for name in ("x", "dt", "B", "C"):
        changed = {**arrays, name: arrays[name].copy()}
        changed[name][:, t] = 1.5 * changed[name][:, t] + 1
        after = torch_ssd(changed, chunk=16)[0]
        assert torch.equal(after[:, :t], y[:, :t])
        assert not torch.equal(after[:, t], y[:, t])
    c[:, t] += 1
    f[:, t] = 0.5
    after = ops.mlgru(torch.from_numpy(f), torch.from_numpy(c))[0]
    assert torch.equal(after[:, :t], h[:, :t])
    assert not torch.equal(after[:, t], h[:, t])


def test_low_precision_is_kept_and_states_are_float32():
    f, c, _ = (torch.from_numpy(a).bfloat16() for a in mlgru_inputs(9))
    h, last = ops.mlgru(f, c)
    assert (h.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    y, state = torch_ssd({n: torch.from_numpy(a).bfloat16() for n, a in ssd_inputs(9).items()})
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_shapes_that_do_not_fit_are_refused():
    f, c, state = (torch.from_numpy(a) for a in mlgru_inputs(4))
    with pytest.raises(ThriftyError, match=r"\[mlgru\] f and c must be"):
        ops.mlgru(f, c[:, 1:])
    with pytest.raises(ThriftyError, match=r"\[mlgru\] state must be"):
        ops.mlgru(f, c, state[:1])
    arrays = ssd_inputs(4)
    for name, value, message in (
        ("dt", arrays["dt"][:, 1:], "x must be"),
        ("B", arrays["B"][..., :3], "B and C must be"),
        ("state", arrays["state"][:1], "state must be"),
    ):
        with pytest.raises(ThriftyError, match=message):
            torch_ssd({**arrays, name: value})
    with pytest.raises(ThriftyError, match="chunk must be at least 1; got 0"):
        torch_ssd(arrays, chunk=0)
