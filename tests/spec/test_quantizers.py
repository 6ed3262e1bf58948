import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.spec import EPS, absmean, binary_codes, quantize_per_token, rms_norm, round_bf16, ternary_codes


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_round_bf16_is_the_nearest_with_ties_to_even(value):
    got = float(round_bf16(np.float32(value)))
    bits = np.float32(got).view(np.uint32)
    assert bits & 0xFFFF == 0
    if np.isinf(got):
        return
    ulp = 2.0 ** (max(np.frexp(np.float64(value))[1], -125) - 8)
    assert abs(got - float(np.float32(value))) <= ulp / 2
    if abs(got - float(np.float32(value))) == ulp / 2:
        assert (bits >> 16) & 1 == 0


def test_ternary_codes_cut_at_half_the_scale_with_ties_to_even():
    w = np.array([-2.0, -0.51, -0.5, -0.1, 0.0, 0.5, 0.51, 3.0], np.float32)
    np.testing.assert_array_equal(ternary_codes(w, np.float32(1), np), [-1, -1, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(ternary_codes(np.array([1.5, -1.5], np.float32), np.float32(1), np), [1, -1])


def test_a_zero_matrix_has_a_scale_and_zero_codes():
    w = np.zeros((4, 4), np.float32)
    scale = absmean(w, np, round_bf16)
    assert scale == round_bf16(np.float32(EPS))
    assert not ternary_codes(w, scale, np).any()


def test_absmean_is_a_bf16_value_near_the_mean():
    w = np.random.default_rng(0).normal(size=(300, 70)).astype(np.float32)
    scale = absmean(w, np, round_bf16)
    assert scale == round_bf16(scale)
    assert abs(scale / np.abs(w).mean() - 1) <= 2**-8


def test_binary_codes_are_the_sign_about_the_mean_and_minus_at_it():
    np.testing.assert_array_equal(binary_codes(np.array([[1, 2], [3, 2]], np.float32), np), [[-1, -1], [1, -1]])


@pytest.mark.parametrize("d", [1, 3, 16, 17, 63, 257, 500])
def test_rms_norm_is_the_textbook_within_rounding(d):
    x = np.random.default_rng(d).normal(size=(5, d)).astype(np.float32)
    gain = np.random.default_rng(1).normal(size=d).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(rms_norm(x, gain), expected, rtol=2e-6, atol=1e-7)


def test_rms_norm_sums_lane_by_lane():
    # 2^24 + 1 is lost in float32: element 16 shares lane 0 with element 0, element 1 has a lane of its own.
    x = np.zeros((2, 32), np.float32)
    x[:, 0] = 2.0**12
    x[0, 16] = 1
    x[1, [16, 17]] = 1
    with np.errstate(all="raise"):
        first, second = rms_norm(x)[:, 0]
    assert first == np.float32(2.0**12) * (np.float32(1) / np.sqrt(np.float32(2.0**24) / np.float32(32)))
    assert second == first  # 2^24 + 1 rounds to 2^24 when the lanes fold


@pytest.mark.parametrize("norm", [True, False])
def test_codes_reach_127_and_reconstruct_to_half_a_step(norm):
    x = np.random.default_rng(0).normal(size=(7, 500)).astype(np.float32)
    codes, scales = quantize_per_token(x, norm=norm)
    y = rms_norm(x) if norm else x
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(np.abs(codes).max(-1), np.full(7, 127))
    assert (np.abs(codes * scales[:, None] - y) <= scales[:, None] * 0.5001).all()


def test_zero_rows_give_zero_codes_and_the_floor_scale():
    codes, scales = quantize_per_token(np.zeros((2, 5), np.float32))
    assert not codes.any()
    np.testing.assert_array_equal(scales, np.full(2, np.float32(EPS) / np.float32(127)))
