import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thrifty.runtime.generation import Sampling
from thrifty.spec import penalize_repetition, sample

FEW = st.lists(st.integers(-4, 4), min_size=1, max_size=40)


@given(FEW, st.integers(0, 50), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.3, 0.9, 1.0]), st.integers(0, 9))
def test_choosing_is_the_specs_sampling(values, top_k, temperature, top_p, seed):
    logits = np.array(values, np.float32)
    sampling = Sampling(temperature, top_k, top_p)
    for draw in range(3):
        mine, theirs = (np.random.default_rng([seed, draw]) for _ in range(2))
        assert sampling.choose(logits, [], mine) == sample(logits, theirs, temperature, top_k, top_p)


def test_the_penalty_is_the_specs():
    logits = np.array([3, -1, 2.9, 0.5], np.float32)
    assert Sampling(repetition_penalty=2).choose(logits, [0, 0, 1], np.random.default_rng(0)) == 2
    assert penalize_repetition(logits, np.array([0, 0, 1]), 2).argmax() == 2
