import numpy as np

from thrifty.spec import ternary_matmul


def test_the_product_is_exact_and_scaled_once():
    rng = np.random.default_rng(0)
    x, w = rng.integers(-127, 128, (4, 300)).astype(np.int8), rng.integers(-1, 2, (9, 300)).astype(np.int8)
    s_x, s_w = rng.random(4).astype(np.float32), np.float32(0.37)
    expected = (x.astype(np.int64) @ w.T.astype(np.int64)).astype(np.float32) * (s_x[:, None] * s_w)
    np.testing.assert_array_equal(ternary_matmul(x, s_x, w, s_w), expected)
    assert ternary_matmul(x, s_x, w, s_w).dtype == np.float32


def test_scale_per_row_and_bias():
    x, w = np.full((1, 8), 127, np.int8), np.array([[1] * 8, [-1] * 8], np.int8)
    y = ternary_matmul(x, np.array([0.5], np.float32), w, np.array([2, 4], np.float32), np.array([1, -1], np.float32))
    np.testing.assert_array_equal(y, [[8 * 127 + 1, -8 * 127 * 2 - 1]])
