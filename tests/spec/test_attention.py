import numpy as np
import pytest

from thrifty.spec import attention, attention_int8


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


def test_eight_bits_are_near_and_exact_where_codes_are():
    rng = np.random.default_rng(3)
    for T, S, heads, kv_heads, d in ((1, 600, 4, 2, 64), (300, 300, 2, 1, 16)):
        q = rng.standard_normal((T, heads, d)).astype(np.float32)
        k, v = rng.standard_normal((2, S, kv_heads, d)).astype(np.float32)
        exact = attention(q, k, v, S - T)
        assert 0 < np.abs(attention_int8(q, k, v, S - T) - exact).max() < 0.02 * np.abs(exact).max()
        # Codes times a power of two lose nothing, and what is left is the weights' rounding.
        q, k, v = (np.rint(x * 20).clip(-127, 127) / 16 for x in (q, k, v))
        for x in (q, k, v):
            x[..., 0] = 127 / 16
        q, k, v = (x.astype(np.float32) for x in (q, k, v))
        exact = attention(q, k, v, S - T)
        assert np.abs(attention_int8(q, k, v, S - T) - exact).max() < 5e-4 * np.abs(exact).max()
