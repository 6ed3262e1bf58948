import numpy as np
import pytest

from thrifty import native, spec
from thrifty.errors import ThriftyError


@pytest.mark.parametrize("n", [1, 3, 63, 257])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_topk_is_that_of_the_spec(implementation, rng, n, threads):
    x, y = rng.standard_normal((2, 40, n)).astype(np.float32)
    x[1], x[2, ::2], y[3] = 0, np.nan, np.round(y[3])
    for k in {1, min(7, n * n), min(64, n * n)}:
        for actual, expected in zip(
            native.product_key_topk(x, y, k, threads), spec.product_key_topk(x, y, k), strict=True
        ):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("d", [1, 3, 63, 257, 500])
@pytest.mark.parametrize("act", sorted(spec.ACTIVATIONS))
def test_experts_are_those_of_the_spec(library, rng, d, act):
    for n, k in ((1, 1), (3, 7), (2, 64)):
        x, down, up = (rng.standard_normal((rows, d)).astype(np.float32) for rows in (n, 90, 90))
        weights, indices = rng.standard_normal((n, k)).astype(np.float32), rng.integers(0, 90, (n, k))
        hidden, y = native.product_key_experts(x, indices, weights, down, up, act)
        expected = spec.product_key_experts(x, indices, weights, down, up, spec.ACTIVATIONS[act])
        # The operands are about 1: an activation that all but vanishes is not the measure of its rounding.
        atol = spec.TOLERANCES["float32"] * max(1, np.abs(expected).max())
        np.testing.assert_allclose(y, expected, rtol=0, atol=atol)
        # One half alone gives the bits of both together.
        alone, none = native.product_key_experts(x, indices, None, down, None)
        assert none is None
        np.testing.assert_array_equal(alone, hidden)
        coefficients = native.glu(hidden, weights, act)
        np.testing.assert_array_equal(native.product_key_experts(None, indices, coefficients, None, up)[1], y)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_tables_of_sixteen_bits(library, rng, dtype):
    x, weights = rng.standard_normal((3, 35)).astype(np.float32), rng.standard_normal((3, 9)).astype(np.float32)
    indices = rng.integers(0, 90, (3, 9))
    halves = [rng.standard_normal((90, 35)).astype(np.float16) for _ in range(2)]
    wide = [half.astype(np.float32) for half in halves]
    if dtype == "BF16":
        halves = [(table.view(np.uint32) >> 16).astype(np.uint16) for table in wide]
        wide = [(half.astype(np.uint32) << 16).view(np.float32) for half in halves]
    for actual, expected in zip(
        native.product_key_experts(x, indices, weights, halves[0], halves[1], "silu", dtype),
        native.product_key_experts(x, indices, weights, wide[0], wide[1], "silu"),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)


def test_bits_depend_on_neither_threads_nor_the_batch(library, rng):
    x, down, up = (rng.standard_normal((rows, 257)).astype(np.float32) for rows in (29, 400, 400))
    weights, indices = rng.standard_normal((29, 13)).astype(np.float32), rng.integers(0, 400, (29, 13))
    _, expected = native.product_key_experts(x, indices, weights, down, up, "silu", n_threads=1)
    for threads in (2, 3, 7):
        _, y = native.product_key_experts(x, indices, weights, down, up, "silu", n_threads=threads)
        np.testing.assert_array_equal(y, expected)
    for t in range(29):
        row = slice(t, t + 1)
        _, y = native.product_key_experts(x[row], indices[row], weights[row], down, up, "silu")
        np.testing.assert_array_equal(y, expected[row])


def test_wrong_arguments_are_named(library):
    x, weights, table = np.zeros((2, 8), np.float32), np.zeros((2, 3), np.float32), np.zeros((5, 8), np.float32)
    with pytest.raises(ThriftyError, match="numbers must be 0 to 4; got 0 to 5"):
        native.product_key_experts(x, np.array([[0, 1, 5], [0, 1, 2]]), weights, table, table)
    with pytest.raises(ThriftyError, match=r"must be contiguous and fit; got float32 \(2, 7\) for \(2, 8\)"):
        native.product_key_experts(x[:, 1:], np.zeros((2, 3), np.int64), weights, table, table)


def test_without_the_library_there_are_no_experts(implementation):
    if implementation == "numpy":
        with pytest.raises(ThriftyError, match="there is no native library; install with a C"):
            native.product_key_experts(None, np.zeros((1, 1), np.int64), None, np.zeros((1, 1), np.float32), None)


@pytest.fixture
def library(implementation):
    if implementation == "numpy":
        pytest.skip("the experts are the library's; torch has its own text of them")
