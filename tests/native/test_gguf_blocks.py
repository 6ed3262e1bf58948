import numpy as np
import pytest

from thrifty import ThriftyError, native, spec
from thrifty.native import _library
from thrifty.native._gguf_blocks import KIND_IDS

THREADS = (1, 2, 3, 7)
#: Shapes of few and of many blocks; the last is shared out among threads.
SHAPES = ((1, 1), (3, 2), (63, 1), (257, 5))

pytestmark = pytest.mark.usefixtures("implementation")


def ternary(rng, rows, cols):
    codes = rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    codes[rows // 2, : cols // 2] = 0
    return codes


@pytest.mark.parametrize("kind", spec.GGUF_TERNARY)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_bytes_are_those_of_the_spec(rng, kind, shape):
    codes = ternary(rng, shape[0], shape[1] * spec.GGUF_BLOCKS[kind].weights)
    expected = spec.gguf_encode(kind, codes, 0.02734375)
    expected_codes, expected_scales = spec.gguf_decode(kind, expected, *codes.shape)
    for n_threads in THREADS:
        data = native.gguf_encode(kind, codes, 0.02734375, n_threads)
        np.testing.assert_array_equal(data, expected, strict=True)
        again, scales = native.gguf_decode(kind, data, codes.shape[0], codes.shape[1], n_threads)
        np.testing.assert_array_equal(again, expected_codes, strict=True)
        np.testing.assert_array_equal(scales, expected_scales, strict=True)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_every_scale_is_told_once_and_one_of_0_makes_zeros(rng, kind):
    codes = ternary(rng, 63, 1280)
    blocks = spec.gguf_encode(kind, codes, 1).reshape(-1, spec.GGUF_BLOCKS[kind].block_bytes)
    d = np.array([0.5, 0, 3, 0.25], "<f2")[rng.integers(0, 4, len(blocks))]
    blocks[:, -2:] = d[:, None].view(np.uint8)
    expected = spec.gguf_decode(kind, blocks, 63, 1280)
    got = native.gguf_decode(kind, blocks, 63, 1280, 3)
    np.testing.assert_array_equal(expected[1], [0.25, 0.5, 3])
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("kind", spec.GGUF_TERNARY)
def test_zeros_have_no_scale_but_in_i2_s(kind):
    codes = np.zeros((3, 256), np.int8)
    data = native.gguf_encode(kind, codes, 0.5)
    np.testing.assert_array_equal(data, spec.gguf_encode(kind, codes, 0.5))
    again, scales = native.gguf_decode(kind, data, 3, 256)
    assert not again.any()
    np.testing.assert_array_equal(scales, np.array([0.5] if kind == "I2_S" else [], np.float32), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (257, 320)])
def test_q8_0_is_that_of_the_spec(rng, dtype, shape):
    floats = (rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 2, (shape[0], 1))).astype(np.float32)
    floats[0, :5] = 127, 0.5, -0.5, 2.5, -0.0
    floats[-1, -32:] = 0
    if dtype == np.uint16:
        values = (floats.view(np.uint32) >> 16).astype(np.uint16)
        floats = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        values = floats.astype(dtype)
        floats = values.astype(np.float32)
    expected = spec.quantize_q8_0(floats)
    for n_threads in THREADS:
        data = native.quantize_q8_0(values, n_threads)
        np.testing.assert_array_equal(data, expected, strict=True)
        again = native.dequantize_q8_0(data, shape[0], shape[1], n_threads)
        np.testing.assert_array_equal(again, spec.dequantize_q8_0(expected, *shape), strict=True)


def test_q8_0_takes_every_half(rng):
    bits = np.arange(2**16, dtype=np.uint16)
    halves = bits[(bits & 0x7C00) != 0x7C00]
    values = rng.permutation(halves).view(np.float16).reshape(-1, 32)
    np.testing.assert_array_equal(native.quantize_q8_0(values), spec.quantize_q8_0(values.astype(np.float32)))


def test_q8_0_of_what_is_smallest_and_largest(rng):
    floats = np.exp2(rng.uniform(-149, 22.9, (500, 32))).astype(np.float32) * rng.choice([-1, 1], (500, 32))
    floats *= np.float32(10.0) ** -rng.integers(0, 40, (500, 1))
    np.testing.assert_array_equal(
        native.quantize_q8_0(floats.astype(np.float32)), spec.quantize_q8_0(floats.astype(np.float32))
    )


def test_values_may_be_a_part_of_an_array(rng):
    values = rng.normal(size=(6, 128)).astype(np.float32)
    np.testing.assert_array_equal(native.quantize_q8_0(values[::2, 32:96]), spec.quantize_q8_0(values[::2, 32:96]))
    codes = ternary(rng, 6, 512)
    np.testing.assert_array_equal(
        native.gguf_encode("TQ2_0", codes[::2, 256:], 2), spec.gguf_encode("TQ2_0", codes[::2, 256:], 2)
    )


@pytest.mark.parametrize("kind", spec.GGUF_TERNARY)
def test_what_is_wrong_is_said_as_the_spec_says_it(rng, kind):
    codes = ternary(rng, 3, 256)
    data = spec.gguf_encode(kind, codes, 0.5)
    wrong_code, wrong_digit, wrong_scale = codes.copy(), data.copy(), data.copy()
    wrong_code[2, 255] = -2
    wrong_digit[20] = 0xFF if kind == "I2_S" else 1 if kind == "TQ1_0" else 0b11
    at, float_type = (slice(-32, -28), "<f4") if kind == "I2_S" else (slice(-2, None), "<f2")
    wrong_scale[at] = np.array([np.nan], float_type).view(np.uint8)
    for call in (
        lambda module: module.gguf_encode(kind, wrong_code, 0.5),
        lambda module: module.gguf_encode(kind, codes, 0),
        lambda module: module.gguf_encode(kind, codes, np.inf),
        lambda module: module.gguf_encode(kind, codes[:, :96], 1),
        lambda module: module.gguf_encode("Q8_0", codes, 1),
        lambda module: module.gguf_decode(kind, wrong_digit, 3, 256),
        lambda module: module.gguf_decode(kind, wrong_scale, 3, 256),
        lambda module: module.gguf_decode(kind, data[1:], 3, 256),
        lambda module: module.gguf_decode(kind, data, 3, 250),
    ):
        with pytest.raises(ThriftyError) as expected:
            call(spec)
        with pytest.raises(ThriftyError) as got:
            call(native)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 9e6])
def test_q8_0_refuses_what_it_cannot_hold(bad):
    values = np.zeros((257, 320), np.float32)
    values[200, 300] = bad
    for given in (values, (values.view(np.uint32) >> 16).astype(np.uint16)):
        with pytest.raises(ThriftyError, match=r"\[quantize_q8_0\] values must be finite"):
            native.quantize_q8_0(given)


def test_arguments_that_are_no_such_arrays_are_refused():
    with pytest.raises(ThriftyError, match="codes must be int8"):
        native.gguf_encode("TQ2_0", np.zeros((2, 256), np.int16), 1)
    with pytest.raises(ThriftyError, match="values must be float32, float16 or bits of bfloat16"):
        native.quantize_q8_0(np.zeros((2, 32)))
    with pytest.raises(ThriftyError, match="take 68 bytes; got 67"):
        native.dequantize_q8_0(np.zeros(67, np.uint8), 2, 32)


def test_nothing_is_written_beside_the_result(rng, guarded):
    library = _library.load()
    if library is None:
        return
    codes = ternary(rng, 3, 256)
    for kind, number in KIND_IDS.items():
        size = spec.GGUF_BLOCKS[kind].nbytes(3, 256)
        data, back, scales = guarded((size,), np.uint8), guarded((3, 256), np.int8), guarded((6,), np.float32)
        assert library.gguf_encode(number, codes.ctypes.data, 3, 256, 0.5, data.address, 2) == 0
        assert library.gguf_decode(number, data.address, 3, 256, back.address, scales.address, 2) == 0
        assert [array.intact() for array in (data, back, scales)] == [True] * 3
        np.testing.assert_array_equal(back.array, codes)
