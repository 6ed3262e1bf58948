import numpy as np
import pytest

from thrifty.spec import penalize_repetition, sample

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def draws(n=4000, **options):
    rng = np.random.default_rng(0)
    return np.bincount([sample(LOGITS, rng, **options) for _ in range(n)], minlength=4) / n


def test_temperature_zero_takes_the_first_of_the_best():
    assert sample(np.array([1, 3, 3], np.float32), np.random.default_rng(0), temperature=0) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.75}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.76}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
    ],
)
def test_draws_follow_the_kept_distribution(options, expected):
    got = draws(**options)
    np.testing.assert_allclose(got, expected, atol=0.03)
    assert (got[np.asarray(expected) == 0] == 0).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_temperature_near_zero_takes_the_best(temperature, top_p):
    rng = np.random.default_rng(0)
    for logits in (LOGITS, LOGITS + 1000, LOGITS - 1000):
        assert sample(logits, rng, temperature, top_p=top_p) == 0


def test_a_seed_repeats():
    a, b = (np.random.default_rng(3) for _ in range(2))
    assert [sample(LOGITS, a) for _ in range(20)] == [sample(LOGITS, b) for _ in range(20)]


def test_repetition_penalty_lowers_seen_tokens_whatever_their_sign():
    out = penalize_repetition(np.array([2, -2, 1], np.float32), np.array([0, 1, 1]), 2.0)
    np.testing.assert_array_equal(out, [1, -4, 1])
