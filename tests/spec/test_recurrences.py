import numpy as np

from thrifty.spec import gate_bounds, mlgru, ssd


def test_mlgru_goes_on_from_its_state():
    rng = np.random.default_rng(0)
    f, c = rng.uniform(size=(11, 3)), rng.normal(size=(11, 3))
    whole = mlgru(f, c)
    np.testing.assert_array_equal(mlgru(f[4:], c[4:], whole[3]), whole[4:])
    np.testing.assert_allclose(whole[1], f[1] * (1 - f[0]) * c[0] + (1 - f[1]) * c[1])


def test_mlgru_keeps_its_state_where_the_gate_is_open():
    state = np.array([2.0, -1.0])
    np.testing.assert_array_equal(mlgru(np.ones((5, 2)), np.full((5, 2), 9.0), state), [state] * 5)


def test_no_gate_goes_below_its_bound():
    rng = np.random.default_rng(0)
    f, c, bounds = rng.uniform(size=(11, 3)), rng.normal(size=(11, 3)), np.array([0, 0.5, 1])
    h = mlgru(f, c, bounds=bounds)
    np.testing.assert_array_equal(h[:, 0], mlgru(f, c)[:, 0])
    np.testing.assert_array_equal(h[:, 1], mlgru(0.5 + 0.5 * f, c)[:, 1])
    np.testing.assert_array_equal(h[:, 2], 0)


def test_bounds_rise_from_zero_by_shares_of_one():
    values = np.random.default_rng(0).normal(size=(5, 3))
    bounds = gate_bounds(values)
    shares = np.exp(values) / np.exp(values).sum(0)
    np.testing.assert_array_equal(bounds[0], 0)
    np.testing.assert_allclose(np.diff(bounds, axis=0), shares[1:])
    np.testing.assert_allclose(bounds[-1], 1 - shares[0])


def test_ssd_is_attention_with_decay():
    rng = np.random.default_rng(1)
    x, B, C = rng.normal(size=(9, 4, 3)), rng.normal(size=(9, 2, 5)), rng.normal(size=(9, 2, 5))
    dt, A, D = rng.uniform(0.1, 1, (9, 4)), -rng.uniform(0.5, 2, 4), rng.normal(size=4)
    y, _ = ssd(x, dt, A, B, C, D)
    for h in range(4):
        decay = np.exp(A[h] * (np.cumsum(dt[:, h])[:, None] - np.cumsum(dt[:, h])[None]))
        weights = np.tril(C[:, h // 2] @ B[:, h // 2].T * decay) * dt[:, h]
        np.testing.assert_allclose(y[:, h], weights @ x[:, h] + D[h] * x[:, h])


def test_ssd_goes_on_from_its_state():
    rng = np.random.default_rng(2)
    x, B, C = rng.normal(size=(8, 2, 3)), rng.normal(size=(8, 1, 4)), rng.normal(size=(8, 1, 4))
    dt, A = rng.uniform(0.1, 1, (8, 2)), -np.ones(2)
    whole, end = ssd(x, dt, A, B, C)
    first, state = ssd(x[:3], dt[:3], A, B[:3], C[:3])
    rest, last = ssd(x[3:], dt[3:], A, B[3:], C[3:], state=state)
    np.testing.assert_allclose(np.concatenate([first, rest]), whole)
    np.testing.assert_allclose(last, end)
