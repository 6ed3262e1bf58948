"""The ternary code of Keras-MML, against its published vectors and an encoder that writes one bit after the other."""

from collections import Counter

import numpy as np
import pytest
from keras_mml_files import encode_ternary

from thrifty.checkpoint.keras_mml import decode_ternary
from thrifty.errors import ThriftyError

VECTORS = [
    ([[1, 1, 1], [-1, 0, 1], [0, 1, 0], [1, 1, -1]], b"\x83\x920"),
    ([[1, 1, 1, -1], [0, 1, 0, 1], [0, 1, 1, -1]], b"\x83\x920"),
    ([1, -1, 1, 0, -1, 1], b"\xb4\xe0"),
    ([[0, 1, -1], [-1, 0, 0]], b"n\x80"),
    ([[[0, 1, -1], [-1, 1, 0]], [[1, 0, 0], [0, -1, 1]]], b"K\xe48"),
    ([[[0, 1, -1], [-1, 1, 0]], [[1, -1, 0], [0, -1, 1]]], b"K\xe5\x9c"),
]


@pytest.mark.parametrize(("values", "encoded"), VECTORS)
def test_published_vectors(values, encoded):
    values = np.array(values)
    found = decode_ternary(np.frombuffer(encoded, np.uint8), values.shape)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, values)
    assert encode_ternary(values).tobytes() == encoded


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (63, 257), (500, 9)])
@pytest.mark.parametrize("shares", [(1, 0, 0), (0, 0, 1), (0, 1, 0), (0.05, 0.05, 0.9), (0.9, 0.1, 0), (0.3, 0.4, 0.3)])
def test_every_mixture_of_the_three(shape, shares):
    codes = np.random.default_rng(0).choice([-1, 0, 1], p=shares, size=shape)
    np.testing.assert_array_equal(decode_ternary(encode_ternary(codes), shape), codes)


def test_long_runs_of_the_least_common_cross_bytes():
    """The code "11" throughout: bytes of eight 1s say nothing about where a code begins."""
    codes = np.repeat([0, -1, 1, -1, 0], [1000, 333, 500, 66, 1])
    assert Counter(codes.tolist()).most_common()[-1][0] == -1
    for first in range(4):
        shifted = codes[first:]
        np.testing.assert_array_equal(decode_ternary(encode_ternary(shifted), shifted.shape), shifted)


@pytest.mark.parametrize("count", range(1, 20))
def test_every_length_of_padding(count):
    codes = np.arange(count) % 3 - 1
    np.testing.assert_array_equal(decode_ternary(encode_ternary(codes), codes.shape), codes)


def test_bits_that_fill_the_last_byte_may_be_followed_by_a_whole_byte_of_padding():
    codes = np.ones(5, np.int8)
    assert encode_ternary(codes).tobytes() == b"\x80"
    np.testing.assert_array_equal(decode_ternary(np.array([0x80, 0], np.uint8), (5,)), codes)


def test_errors_say_what_to_do():
    codes = np.random.default_rng(1).integers(-1, 2, (40, 30))
    encoded = encode_ternary(codes)
    with pytest.raises(ThriftyError, match="must not be empty"):
        decode_ternary(np.empty(0, np.uint8), (0,))
    with pytest.raises(ThriftyError, match=r"takes 1200 codes; got 11\d\d; the file is damaged, or of Keras-MML 0.1.0"):
        decode_ternary(encoded[:-10], codes.shape)
    with pytest.raises(ThriftyError, match="takes 1230 codes"):
        decode_ternary(encoded, (41, 30))
    with pytest.raises(ThriftyError, match="takes 1170 codes; the bytes hold others"):
        decode_ternary(encoded, (39, 30))
    with pytest.raises(ThriftyError, match="the bytes hold others"):
        decode_ternary(np.append(encoded, np.zeros(2, np.uint8)), codes.shape)
    with pytest.raises(ThriftyError, match="takes 4 codes"):  # the header names one symbol twice
        decode_ternary(np.array([0b00010000], np.uint8), (4,))


def test_a_file_of_the_version_without_a_header_is_refused():
    codes = np.random.default_rng(2).integers(-1, 2, (50, 20))
    fixed = {0: "0", 1: "10", -1: "11"}
    bits = "".join(fixed[code] for code in codes.reshape(-1).tolist())
    old = np.frombuffer(int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big"), np.uint8)
    with pytest.raises(ThriftyError, match=r"Keras-MML 0\.1\.0"):
        decode_ternary(old, codes.shape)
