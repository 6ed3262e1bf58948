import numpy as np

from thrifty.spec import apply_rope, rope_tables


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 32)).astype(np.float32)

    def score(i, j):
        return (apply_rope(q, *rope_tables(np.array([i]), 32)) * apply_rope(k, *rope_tables(np.array([j]), 32))).sum()

    np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_position_zero_changes_nothing_and_lengths_are_kept():
    x = np.random.default_rng(1).normal(size=(3, 2, 8)).astype(np.float32)
    y = apply_rope(x, *rope_tables(np.arange(3), 8))
    np.testing.assert_array_equal(y[0], x[0])
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
