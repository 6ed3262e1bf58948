"""Dynamic mask attention of torch against the spec, on the same arrays."""

import numpy as np
import pytest
import torch

from thrifty import ops, spec

HEADS = [(4, 2, 2), (4, 2, 4), (1, 1, 1)]


def array(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def tensor(a: np.ndarray) -> torch.Tensor:
    """[S, heads, ...] as [1, heads, S, ...]."""
    return torch.from_numpy(np.ascontiguousarray(np.swapaxes(a, 0, 1)))[None]


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    atol = spec.TOLERANCES["float32"] * np.abs(expected).max()
    np.testing.assert_allclose(actual[0].transpose(0, 1).detach().numpy(), expected, rtol=0, atol=atol)


def case(T: int, S: int, shape: tuple[int, int, int], ties: bool):
    heads, kv_heads, score_heads = shape
    rng = np.random.default_rng(T + S + score_heads)
    q, k, v = array(rng, T, heads, 10), array(rng, S, kv_heads, 10), array(rng, S, kv_heads, 10)
    return q, k, v, np.ones((S, score_heads), np.float32) if ties else array(rng, S, score_heads)


@pytest.mark.parametrize("T", [1, 3, 63, 257, 500])
@pytest.mark.parametrize("window", [1, 3, 64, None])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "equal"])
def test_attention(T, window, heads, ties):
    for S in (T, T + 90):
        arrays = case(T, S, heads, ties)
        y = ops.dynamic_mask_attention(*map(tensor, arrays), window=window)
        close(y, spec.dynamic_mask_attention(*arrays, window=window, first_position=S - T))


@pytest.mark.parametrize("T", [3, 63, 257])
@pytest.mark.parametrize("window", [1, 3, 64, None])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "equal"])
def test_padding_is_as_if_it_were_not_there(T, window, side, ties):
    left, right = {"left": (70, 0), "right": (0, 70), "both": (1, 3)}[side]
    arrays = case(T, T, (4, 2, 2), ties)
    expected = spec.dynamic_mask_attention(*arrays, window=window)
    poison = [np.pad(a, ((left, right), *[(0, 0)] * (a.ndim - 1)), constant_values=9) for a in arrays]
    mask = torch.zeros(1, left + T + right, dtype=torch.bool)
    mask[:, left : left + T] = True
    for given in (mask, mask[:, None].expand(1, 2, -1)):
        y = ops.dynamic_mask_attention(*map(tensor, poison), window=window, mask=given)
        close(y[:, :, left : left + T], expected)
        assert not y[:, :, :left].any()


@pytest.mark.parametrize("window", [1, 3, 64])
def test_intervals(window):
    scores = np.random.default_rng(0).integers(0, 9, (3, 2, 257)).astype(np.float32)
    ends = ops.kept_until(torch.from_numpy(scores), window)
    np.testing.assert_array_equal(ends, [[spec.kept_until(head, window) for head in row] for row in scores])
    hidden = ops.kept_until(torch.from_numpy(scores), window, torch.arange(257).expand(3, -1) >= 57)
    kept = [[57 + spec.kept_until(head[57:], window) for head in row] for row in scores]
    np.testing.assert_array_equal(hidden[..., 57:], kept)
    assert not hidden[..., :57].any()


def test_scores():
    rng = np.random.default_rng(0)
    v, A, weight, bias = array(rng, 63, 2, 8), array(rng, 3), array(rng, 3, 16), array(rng, 3)
    scores = ops.key_scores(tensor(v), *map(torch.from_numpy, (A, weight, bias)))
    close(scores, spec.key_scores(v, A, weight, bias))
    close(ops.key_scores(tensor(v), *map(torch.from_numpy, (A, weight))), spec.key_scores(v, A, weight))
