import numpy as np
import pytest

from thrifty.checkpoint import Tensor
from thrifty.checkpoint.latent import multiplied_codes, rounded_scale, scaled_codes, transformers_factor
from thrifty.spec import absmean, round_bf16, ternary_codes


def weights(dtype: str) -> Tensor:
    """Weights of every size, many of them as near to half a scale as the dtype has."""
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.02, (257, 63)).astype(np.float32)
    half = np.float32(np.abs(values).mean() / 2)
    steps = np.array(
        [half, np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(1)), 0.0, -0.0], np.float32
    )
    values[::3] = rng.choice(np.concatenate([steps, -steps]), values[::3].shape)
    return Tensor.of(values, dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_codes_and_scales_are_the_spec_s(dtype):
    weight = weights(dtype)
    scale = rounded_scale(weight)
    assert scale == absmean(weight.float32(), np, round_bf16)
    for near in (scale, np.nextafter(scale, np.float32(1)), np.float32(3.3e-3), np.float32(1)):
        np.testing.assert_array_equal(scaled_codes(weight, near), ternary_codes(weight.float32(), near, np))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_transformers_rounds_a_product(dtype):
    weight = weights(dtype)
    factor = transformers_factor(weight)
    assert factor == pytest.approx(1 / np.abs(weight.float32()).mean(), rel=1e-6)
    for near in (factor, np.nextafter(factor, np.float32(0)), np.nextafter(factor, np.float32(1e9)), np.float32(77.7)):
        expected = np.clip(np.rint(weight.float32() * near), -1, 1)
        np.testing.assert_array_equal(multiplied_codes(weight, near), expected)


def test_zeros_have_a_scale():
    weight = Tensor.of(np.zeros((4, 8), np.float32), "BF16")
    assert rounded_scale(weight) == round_bf16(1e-5)
    assert not scaled_codes(weight, rounded_scale(weight)).any()
