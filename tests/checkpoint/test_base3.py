import numpy as np
import pytest

from thrifty import ThriftyError, spec
from thrifty.checkpoint import base3


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (500, 257), (7, 5)])
def test_bytes_are_those_of_the_spec_and_come_back(shape):
    codes = np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)
    packed = base3.encode(codes)
    np.testing.assert_array_equal(packed, spec.pack(spec.BASE3_ROW, codes.reshape(1, -1)).ravel())
    np.testing.assert_array_equal(base3.decode(packed, shape), codes)


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        (np.zeros(3, np.uint8), "2 x 5 codes take 2 bytes"),
        (np.zeros(2, np.int64), "got int64"),
        (np.array([0, 243], np.uint8), "below 243; got 243"),
    ],
)
def test_damaged_bytes(packed, text):
    with pytest.raises(ThriftyError, match=text):
        base3.decode(packed, (2, 5))
