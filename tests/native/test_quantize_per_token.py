import numpy as np
import pytest

from thrifty import native, spec
from thrifty.errors import ThriftyError

WIDTHS = (1, 3, 15, 16, 17, 63, 257, 500, 2560)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("d", WIDTHS)
def test_equals_the_spec(implementation, rng, d, norm):
    for n, gain in ((1, True), (2, False), (7, True)):
        x = (rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-6, 4, (n, 1))).astype(np.float32)
        g = rng.standard_normal(d).astype(np.float32) if gain and norm else None
        codes, scales = native.quantize_per_token(x, g, 1e-5, norm)
        expected_codes, expected_scales = spec.quantize_per_token(x, g, 1e-5, norm)
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("norm", [True, False])
def test_ties_go_to_even(implementation, norm):
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5] + [0.0] * 12], np.float32)
    codes, scales = native.quantize_per_token(x, norm=norm)
    expected = spec.quantize_per_token(x, norm=norm)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])
    if not norm:
        assert codes[0, :9].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-42, 127.0, 3e38])
def test_flat_rows(implementation, value, norm):
    for d in (1, 31, 500):
        x = np.full((2, d), value, np.float32)
        with np.errstate(over="ignore"):
            expected_codes, expected_scales = spec.quantize_per_token(x, norm=norm)
        codes, scales = native.quantize_per_token(x, norm=norm)
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_gets_zeros_and_says_so(implementation, rng, bad, norm):
    for d in (1, 21, 500):
        x = rng.standard_normal((3, d)).astype(np.float32)
        x[1, d // 2] = bad
        codes, scales = native.quantize_per_token(x, norm=norm)
        assert not codes[1].any()
        assert not np.isfinite(scales[1])
        kept = spec.quantize_per_token(x[[0, 2]], norm=norm)
        np.testing.assert_array_equal(codes[[0, 2]], kept[0])
        np.testing.assert_array_equal(scales[[0, 2]], kept[1])


@pytest.mark.parametrize("d", WIDTHS)
def test_rms_norm_equals_the_spec(implementation, rng, d):
    x, gain = rng.standard_normal((5, d)).astype(np.float32), rng.standard_normal(d).astype(np.float32)
    for g in (gain, None):
        out = np.full((5, d), np.nan, np.float32)
        assert native.rms_norm(x, g, 1e-6, out=out) is out
        np.testing.assert_array_equal(out, spec.rms_norm(x, g, 1e-6))
    in_place = x.copy()
    native.rms_norm(in_place, gain, out=in_place)
    np.testing.assert_array_equal(in_place, spec.rms_norm(x, gain))


def test_thread_counts_agree(implementation, rng):
    x, gain = rng.standard_normal((130, 1025)).astype(np.float32), rng.standard_normal(1025).astype(np.float32)
    codes, scales = spec.quantize_per_token(x, gain)
    for n_threads in (1, 2, 3, 7):
        result = native.quantize_per_token(x, gain, n_threads=n_threads)
        np.testing.assert_array_equal(result[0], codes)
        np.testing.assert_array_equal(result[1], scales)
        np.testing.assert_array_equal(native.rms_norm(x, gain, n_threads=n_threads), spec.rms_norm(x, gain))


@pytest.mark.skipif(not native.available(), reason="addresses need the native library")
@pytest.mark.parametrize("d", [1, 17, 500])
def test_padding_is_zeroed_and_nothing_else_written(guarded, rng, d):
    for isa in set(native.built_isas()) & set(native.detected_isas()):
        native.select_isa(isa)
        for stride in (d, d + 1, d + 79):
            x, codes, scales = rng.standard_normal((3, d)).astype(np.float32), *buffers(guarded, stride)
            native.quantize_into(x.ctypes.data, None, 1e-5, True, 3, d, codes.address, stride, scales.address)
            assert codes.intact()
            assert scales.intact()
            np.testing.assert_array_equal(codes.array[:, :d], spec.quantize_per_token(x)[0])
            assert not codes.array[:, d:].any()
            y = guarded((3, d), np.float32)
            native.rms_norm(x, out=y.array)
            assert y.intact()
    native.select_isa(None)


def buffers(guarded, stride):
    return guarded((3, stride), np.int8), guarded((3,), np.float32)


def test_wrong_arguments_are_named(implementation):
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(
        ThriftyError, match=r"\[quantize_per_token\] x must be contiguous float32 \[n, d\]; got float64"
    ):
        native.quantize_per_token(x.astype(np.float64))
    with pytest.raises(ThriftyError, match="gain must be contiguous float32"):
        native.quantize_per_token(x, np.ones(7, np.float32))
    with pytest.raises(ThriftyError, match="x must be"):
        native.rms_norm(x[:, ::2])
    with pytest.raises(ThriftyError, match="out must be"):
        native.rms_norm(x, out=np.empty((2, 7), np.float32))
