import numpy as np
import pytest

from thrifty.spec import product_key_experts, product_key_topk, staircase


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 5), (8, 4), (16, 4), (7, 9), (64, 20)])
def test_the_staircase_holds_every_winner(k, n):
    rng = np.random.default_rng(k * n)
    x, y = np.sort(rng.normal(size=(2, n)))[:, ::-1]
    i, j = staircase(k, n)
    sums, indices = product_key_topk(x, y, k)
    assert set(indices.tolist()) <= set((i * n + j).tolist())
    np.testing.assert_array_equal(np.sort(x[i] + y[j])[::-1][:k], sums)


def test_the_staircase_is_short():
    assert len(staircase(64, 128)[0]) == 280
    assert len(staircase(8, 128)[0]) == 20


def test_of_equal_sums_the_smaller_number_comes_first():
    sums, indices = product_key_topk(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), 4)
    np.testing.assert_array_equal(indices, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(sums, 0)


def test_experts_are_a_small_mlp_of_the_retrieved_rows():
    rng = np.random.default_rng(0)
    x, down, up = rng.normal(size=(3, 5)), rng.normal(size=(16, 5)), rng.normal(size=(16, 5))
    indices, weights = np.array([[3, 3], [0, 15], [7, 2]]), rng.normal(size=(3, 2))
    y = product_key_experts(x, indices, weights, down, up, np.tanh)
    for t in range(3):
        expected = sum(weights[t, s] * np.tanh(x[t] @ down[e]) * up[e] for s, e in enumerate(indices[t]))
        np.testing.assert_allclose(y[t], expected)
