from importlib import import_module

import numpy as np
import pytest
import torch

from thrifty import native, ops, spec
from thrifty.errors import ThriftyError


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Each text that can compute the product on a CPU."""
    if request.param == "native" and not native.available():
        pytest.skip("no native library")
    module = import_module("thrifty.ops.ternary_matmul")  # the package has a function of that name
    monkeypatch.setattr(module, "use_native", lambda x: request.param == "native")


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 500), (257, 63), (63, 257), (500, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_has_the_bits_of_the_spec(path, rows, cols, bias):
    rng = np.random.default_rng(rows)
    w_codes = rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    x_codes, x_scales = rng.integers(-127, 128, (5, cols)).astype(np.int8), rng.random(5).astype(np.float32)
    x_codes[0] = 127
    b = rng.standard_normal(rows).astype(np.float32) if bias else None
    packed = ops.pack_weight(torch.from_numpy(w_codes))
    assert np.array_equal(ops.unpack_weight(packed, rows, cols).numpy(), w_codes)
    y = ops.ternary_matmul(
        torch.from_numpy(x_codes),
        torch.from_numpy(x_scales),
        packed,
        rows,
        torch.tensor([0.25]),
        None if b is None else torch.from_numpy(b),
    )
    assert np.array_equal(y.numpy(), spec.ternary_matmul(x_codes, x_scales, w_codes, 0.25, b))


def test_bytes_of_another_shape_are_refused():
    packed = ops.pack_weight(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(ThriftyError, match="take 128 bytes; got 64"):
        ops.ternary_matmul(torch.zeros(1, 20, dtype=torch.int8), torch.ones(1), packed, 4, torch.ones(1))


def test_torch_accepts_the_op():
    packed = ops.pack_weight(torch.ones(6, 9, dtype=torch.int8))
    arguments = (torch.ones(2, 9, dtype=torch.int8), torch.ones(2), packed, 6, torch.ones(1), None)
    torch.library.opcheck(torch.ops.thrifty.ternary_matmul, arguments)
