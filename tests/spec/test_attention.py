import numpy as np
import pytest

from thrifty.spec import attention


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 257), (5, 5), (3, 600), (63, 500)])
def test_chunks_merge_to_the_plain_softmax(T, S):
    rng = np.random.default_rng(T * S)
    q = rng.normal(size=(T, 6, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, S, 2, 8)).astype(np.float32)
    expected = np.empty_like(q)
    for t in range(T):
        for h in range(6):
            keys = k[: S - T + t + 1, h // 3].astype(np.float64)
            p = np.exp(keys @ q[t, h] / np.sqrt(8))
            expected[t, h] = (p / p.sum()) @ v[: S - T + t + 1, h // 3]
    np.testing.assert_allclose(attention(q, k, v, S - T), expected, rtol=1e-4, atol=1e-6)


def test_the_future_is_not_read():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 4, 2, 8)).astype(np.float32)
    before = attention(q, k, v, 0)
    k[3], v[3] = 1e3, -1e30
    np.testing.assert_array_equal(attention(q, k, v, 0)[:3], before[:3])
