import numpy as np
import pytest

from thrifty import native, spec
from thrifty.errors import ThriftyError


@pytest.mark.parametrize("S", [1, 3, 63, 257, 500])
@pytest.mark.parametrize("window", [1, 3, 64, 500])
@pytest.mark.parametrize("levels", [1, 4, 1 << 20])
def test_equals_the_spec(implementation, rng, S, window, levels):
    scores = (rng.integers(0, levels, (5, S)) - levels // 2).astype(np.float32)
    expected = np.stack([spec.kept_until(row, window) for row in scores])
    for n_threads in (1, 2, 3, 7):
        np.testing.assert_array_equal(native.kept_until(scores, window, n_threads), expected)


def test_minus_zero_ties_with_zero_and_masked_keys_go_first(implementation):
    scores = np.array([[0.0, -0.0, 0.0, -np.inf, 1.0]], np.float32)
    np.testing.assert_array_equal(native.kept_until(scores, 2), [[2, 4, 5, 3, 5]])
    np.testing.assert_array_equal(native.kept_until(np.zeros((2, 0), np.float32), 2), np.zeros((2, 0)))


@pytest.mark.skipif(not native.available(), reason="threads are those of the native library")
def test_many_heads_on_many_threads(rng):
    scores = rng.standard_normal((7, 3000)).astype(np.float32)
    expected = np.stack([spec.kept_until(row, 100) for row in scores])
    for n_threads in (1, 2, 3, 7):
        np.testing.assert_array_equal(native.kept_until(scores, 100, n_threads), expected)


def test_wrong_arguments_are_named(implementation):
    scores = np.zeros((2, 8), np.float32)
    with pytest.raises(ThriftyError, match="window must be at least 1; got 0; None keeps every key"):
        native.kept_until(scores, 0)
    with pytest.raises(ThriftyError, match="contiguous float32"):
        native.kept_until(scores[:, ::2], 1)
    with pytest.raises(ThriftyError, match="contiguous float32"):
        native.kept_until(scores.astype(np.float64), 1)
