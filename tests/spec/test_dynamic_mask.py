import numpy as np
import pytest

from thrifty.spec import attention, dynamic_mask_attention, kept_until, key_scores


@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_a_key_is_active_while_it_is_among_the_best(window, levels):
    scores = np.random.default_rng(levels).integers(0, levels, 40).astype(np.float32)
    ends = kept_until(scores, window)
    for query in range(40):
        best = sorted(range(query + 1), key=lambda j: (scores[j], j), reverse=True)[:window]
        np.testing.assert_array_equal([j for j in range(query + 1) if query < ends[j]], sorted(best))


def test_scores_are_positive_and_start_at_one():
    v = np.random.default_rng(0).normal(size=(7, 2, 4)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    np.testing.assert_array_equal(key_scores(v, np.zeros(2, np.float32), weight), 1)
    scores = key_scores(v, np.array([-1, 1], np.float32), weight, np.array([0, 3], np.float32))
    assert np.all(scores[:, 0] < 1)
    assert np.all(scores[:, 1] > 1)
    expected = np.exp(np.log1p(np.exp(v[3].reshape(-1) @ weight[1] + 3)))
    np.testing.assert_allclose(scores[3, 1], expected, rtol=1e-5)


def test_equal_scores_and_a_wide_window_are_plain_attention():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(9, 4, 8)), rng.normal(size=(12, 2, 8)), rng.normal(size=(12, 2, 8))
    q, k, v = (t.astype(np.float32) for t in (q, k, v))
    scores = np.full((12, 2), 1.5, np.float32)
    for window in (None, 12):
        y = dynamic_mask_attention(q, k, v, scores, window, first_position=3)
        np.testing.assert_allclose(y, attention(q, k, v, 3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score_heads", [2, 4])
def test_steps_that_forget_evicted_keys_give_the_same(score_heads):
    rng = np.random.default_rng(score_heads)
    q, k, v = (rng.normal(size=(20, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    scores = rng.normal(size=(20, score_heads)).astype(np.float32)
    whole = dynamic_mask_attention(q, k, v, scores, 3)
    for h in range(4):
        b, kept = scores[:, h * score_heads // 4], []
        for t in range(20):
            kept.append(t)
            if len(kept) > 3:
                kept.remove(min(kept, key=lambda j: (b[j], j)))
            p = np.exp(k[kept, h // 2] @ q[t, h] / 2 + b[kept])
            np.testing.assert_allclose(whole[t, h], p / p.sum() @ v[kept, h // 2], rtol=1e-4, atol=1e-6)
