import numpy as np
import pytest

from thrifty import native, spec
from thrifty.errors import ThriftyError


@pytest.mark.parametrize(("T", "S", "heads", "kv_heads", "d"), [(1, 1, 1, 1, 2), (3, 63, 4, 2, 18), (5, 257, 6, 1, 64)])
def test_attention_is_the_spec_within_rounding(implementation, rng, T, S, heads, kv_heads, d):
    q = rng.standard_normal((T, heads, d)).astype(np.float32)
    k, v = rng.standard_normal((2, S, kv_heads, d)).astype(np.float32)
    expected = spec.attention(q, k, v, S - T)
    y = native.attention(q, k, v, S - T)
    assert np.abs(y - expected).max() <= spec.TOLERANCES["float32"] * np.abs(expected).max()


def test_a_query_has_the_same_bits_alone_and_among_others(implementation, rng):
    q, k, v = rng.standard_normal((3, 300, 2, 16)).astype(np.float32)
    together = native.attention(q, k, v, 0)
    for t in (0, 7, 255, 256, 299):
        alone = native.attention(q[t : t + 1], k[: t + 1], v[: t + 1], t, n_threads=3)
        if implementation != "numpy":
            np.testing.assert_array_equal(alone[0], together[t])


@pytest.mark.parametrize("act", spec.ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 3, 63, 257, 500])
def test_glu_is_the_spec_within_rounding(implementation, rng, act, n):
    gate, up = (rng.standard_normal((2, 3, n)) * 4).astype(np.float32)
    for second, expected in ((up, spec.glu(gate, up, act)), (None, spec.ACTIVATIONS[act](gate))):
        y = native.glu(gate, second, act)
        assert y.shape == expected.shape
        assert np.abs(y - expected).max() <= spec.TOLERANCES["float32"] * np.abs(expected).max()


def test_shapes_that_do_not_fit():
    q, k = np.zeros((2, 4, 8), np.float32), np.zeros((5, 2, 8), np.float32)
    with pytest.raises(ThriftyError, match=r"\[attention\] q, k, v and first_position must fit"):
        native.attention(q, k, k, 2)
