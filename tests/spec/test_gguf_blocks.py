import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thrifty import ThriftyError, spec

#: Those of the three that the `gguf` package knows; Microsoft's fork alone has I2_S.
PEERS = {"TQ1_0": GGMLQuantizationType.TQ1_0, "TQ2_0": GGMLQuantizationType.TQ2_0}
WIDTH = {kind: spec.GGUF_BLOCKS[kind].weights for kind in spec.GGUF_TERNARY}


def ternary(rows, cols, seed=0):
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, cols)).astype(np.int8)
    codes[0] = 0
    return codes


@pytest.mark.parametrize("kind", spec.GGUF_TERNARY)
@pytest.mark.parametrize("rows", [1, 3, 63])
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_decode_inverts_encode(kind, rows, blocks):
    codes = ternary(rows, blocks * WIDTH[kind], seed=rows + blocks)
    data = spec.gguf_encode(kind, codes, 0.625)
    assert data.size == spec.GGUF_BLOCKS[kind].nbytes(*codes.shape)
    again, scales = spec.gguf_decode(kind, data, *codes.shape)
    np.testing.assert_array_equal(again, codes, strict=True)
    expected = [0.625] if codes.any() or kind == "I2_S" else []
    np.testing.assert_array_equal(scales, np.array(expected, np.float32), strict=True)


@pytest.mark.parametrize("kind", PEERS)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(2.0**-24, 65504, width=32),
    rows=st.integers(1, 4),
    blocks=st.integers(1, 3),
)
@example(seed=0, scale=0.02734375, rows=2, blocks=2)
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_of_the_gguf_package(kind, seed, scale, rows, blocks):
    codes = ternary(rows, 256 * blocks, seed)
    floats = codes * np.float32(scale)
    data = spec.gguf_encode(kind, codes, scale)
    np.testing.assert_array_equal(data, quants.quantize(floats, PEERS[kind]).reshape(-1))
    again, scales = spec.gguf_decode(kind, data, rows, 256 * blocks)
    values = quants.dequantize(data.reshape(rows, -1), PEERS[kind])
    np.testing.assert_array_equal(values, again * (scales[0] if len(scales) else np.float32(0)))


def test_i2_s_puts_weight_0_in_the_highest_bits_and_the_scale_behind_the_codes():
    codes = np.zeros((2, 128), np.int8)
    codes[0, [0, 32, 64, 96]] = -1, 0, 1, 1  # digits 0, 1, 2, 2 of the first byte
    codes[1, 127] = -1  # the last byte's lowest bits
    data = spec.gguf_encode("I2_S", codes, 1.5)
    assert data.size == 256 // 4 + 32
    assert data[0] == 0b00_01_10_10
    assert data[63] == 0b01_01_01_00
    assert set(data[1:63]) == {0b01_01_01_01}
    np.testing.assert_array_equal(data[64:68].view("<f4"), [1.5])
    assert not data[68:].any()


@given(
    values=st.lists(st.floats(-8e6, 8e6, width=32), min_size=64, max_size=64),
    exponent=st.integers(-44, 0),
)
@settings(max_examples=300, deadline=None)
def test_q8_0_is_that_of_the_gguf_package(values, exponent):
    floats = (np.array(values, np.float32) * np.float32(10.0**exponent)).reshape(1, 64)
    data = spec.quantize_q8_0(floats)
    with np.errstate(all="ignore"):
        largest = np.abs(floats.reshape(-1, 32)).max(1) / np.float32(127)
        defined = (largest == 0) | np.isfinite(1 / largest)
        expected = quants.quantize(floats, GGMLQuantizationType.Q8_0)
    for block in np.flatnonzero(defined):
        at = slice(34 * block, 34 * block + 34)
        np.testing.assert_array_equal(data[0, at], expected[0, at])
    np.testing.assert_array_equal(
        spec.dequantize_q8_0(data, 1, 64), quants.dequantize(data, GGMLQuantizationType.Q8_0), strict=True
    )


def test_q8_0_rounds_halves_away_from_zero():
    values = np.zeros((1, 32), np.float32)
    values[0, :5] = 127, 0.5, -0.5, 2.5, -2.5
    np.testing.assert_array_equal(spec.quantize_q8_0(values)[0, 2:7].view(np.int8), [127, 1, -1, 3, -3])


def test_q8_0_of_values_too_small_for_a_reciprocal_is_zero():
    data = spec.quantize_q8_0(np.full((1, 32), 1e-40, np.float32))
    assert not data.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 9e6])
def test_q8_0_refuses_what_it_cannot_hold(bad):
    values = np.zeros((2, 64), np.float32)
    values[1, 40] = bad
    with pytest.raises(ThriftyError, match=r"\[quantize_q8_0\] values must be finite"):
        spec.quantize_q8_0(values)


@pytest.mark.parametrize("kind", spec.GGUF_BLOCKS)
def test_rows_are_whole_blocks(kind):
    width = spec.GGUF_BLOCKS[kind].weights
    for cols in (0, 1, width - 1, width + 32 * (width > 32) + 1):
        with pytest.raises(ThriftyError, match=f"multiple of {width} columns"):
            spec.GGUF_BLOCKS[kind].row_bytes(cols)


@pytest.mark.parametrize("kind", spec.GGUF_TERNARY)
def test_what_cannot_be_encoded_is_refused(kind):
    codes = ternary(2, 256)
    for scale in (0, -1, np.nan, np.inf, *(() if kind == "I2_S" else (1e-9, 7e4))):
        with pytest.raises(ThriftyError, match="must be positive and finite"):
            spec.gguf_encode(kind, codes, scale)
    codes[1, 200] = 2
    with pytest.raises(ThriftyError, match="among"):
        spec.gguf_encode(kind, codes, 1)


@pytest.mark.parametrize("kind", spec.GGUF_TERNARY)
def test_what_cannot_be_decoded_is_refused(kind):
    data = spec.gguf_encode(kind, ternary(2, 256), 0.5)
    with pytest.raises(ThriftyError, match="take"):
        spec.gguf_decode(kind, data[:-1], 2, 256)
    broken = data.copy()
    broken[3] = 1 if kind == "TQ1_0" else 0b01_11_01_01
    with pytest.raises(ThriftyError, match=r"stands for no|got 3"):
        spec.gguf_decode(kind, broken, 2, 256)
    at, float_type = (slice(-32, -28), "<f4") if kind == "I2_S" else (slice(-2, None), "<f2")
    for wrong in (np.nan, np.inf, -1):
        broken = data.copy()
        broken[at] = np.array([wrong], float_type).view(np.uint8)
        with pytest.raises(ThriftyError, match="finite and not negative"):
            spec.gguf_decode(kind, broken, 2, 256)


def test_every_byte_of_tq1_0_that_holds_five_codes_is_read_and_no_other():
    codes = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij"), -1).reshape(-1, 5).astype(np.int8)
    block = np.zeros((len(codes), 256), np.int8)
    block[:, 0:160:32] = codes
    data = spec.gguf_encode("TQ1_0", block, 1).reshape(-1, 54)
    assert len(set(data[:, 0])) == 243
    np.testing.assert_array_equal(spec.gguf_decode("TQ1_0", data, *block.shape)[0], block)
    for byte in set(range(256)) - set(data[:, 0].tolist()):
        broken = data[:1].copy()
        broken[0, 0] = byte
        with pytest.raises(ThriftyError, match="no five codes"):
            spec.gguf_decode("TQ1_0", broken, 1, 256)


@pytest.mark.parametrize("kind", spec.GGUF_TERNARY)
def test_a_scale_of_0_makes_codes_0_and_blocks_keep_their_own_scales(kind):
    codes = np.ones((3, 256), np.int8)
    data = spec.gguf_encode(kind, codes, 0.5)
    if kind == "I2_S":
        data[-32:] = 0
        again, scales = spec.gguf_decode(kind, data, 3, 256)
        assert not again.any()
        assert scales.size == 0
        return
    blocks = data.reshape(3, -1)
    blocks[0, -2:] = np.array([2], "<f2").view(np.uint8)
    blocks[1, -2:] = 0
    again, scales = spec.gguf_decode(kind, data, 3, 256)
    np.testing.assert_array_equal(scales, np.array([0.5, 2], np.float32), strict=True)
    np.testing.assert_array_equal(again, codes * np.array([[1], [0], [1]]))
