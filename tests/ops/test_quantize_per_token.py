from importlib import import_module

import numpy as np
import pytest
import torch

from thrifty import native, ops, spec
from thrifty.errors import ThriftyError

SIZES = (1, 3, 16, 63, 257, 500)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Each text that can compute these ops on a CPU."""
    if request.param == "native" and not native.available():
        pytest.skip("no native library")
    module = import_module("thrifty.ops.quantize_per_token")  # the package has a function of that name
    monkeypatch.setattr(module, "use_native", lambda x: request.param == "native")


def rows(d: int) -> np.ndarray:
    x = np.random.default_rng(d).standard_normal((9, d)).astype(np.float32)
    x[0] = 0
    x[1] *= 1e6
    x[2] *= 1e-8
    x[3] = -7
    return x


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("gain", [False, True])
def test_rms_norm_has_the_bits_of_the_spec(path, d, gain):
    x, g = rows(d), rows(d)[-1] if gain else None
    y = ops.rms_norm(torch.from_numpy(x), None if g is None else torch.from_numpy(g), 1e-5)
    assert np.array_equal(y.numpy(), spec.rms_norm(x, g, 1e-5))


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("norm", [False, True])
def test_codes_and_scales_have_the_bits_of_the_spec(path, d, norm):
    x = rows(d)
    codes, scales = ops.quantize_per_token(torch.from_numpy(x).view(3, 3, d), norm=norm)
    expected_codes, expected_scales = spec.quantize_per_token(x, norm=norm)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.view(9, d).numpy(), expected_codes)
    assert np.array_equal(scales.view(9).numpy(), expected_scales)


def test_bfloat16_is_computed_in_float32(path):
    x = torch.from_numpy(rows(63)).bfloat16()
    assert torch.equal(ops.rms_norm(x), ops.rms_norm(x.float()).bfloat16())
    assert torch.equal(ops.quantize_per_token(x)[0], ops.quantize_per_token(x.float())[0])


def test_rms_norm_gradients_are_those_of_its_formula(path):
    x = torch.randn(4, 33, requires_grad=True)
    gain = torch.randn(33, requires_grad=True)
    grad = torch.randn(4, 33)
    got = torch.autograd.grad(ops.rms_norm(x, gain), (x, gain), grad)
    x64, gain64 = x.detach().double().requires_grad_(), gain.detach().double().requires_grad_()
    formula = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * gain64
    for a, b in zip(got, torch.autograd.grad(formula, (x64, gain64), grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_torch_accepts_the_ops():
    x = torch.randn(2, 3, 17, requires_grad=True)
    torch.library.opcheck(torch.ops.thrifty.rms_norm, (x, torch.ones(17, requires_grad=True), 1e-5))
    torch.library.opcheck(torch.ops.thrifty.quantize_per_token, (x.detach(), None, 1e-5, True))


def test_a_gain_of_another_width_is_refused():
    with pytest.raises(ThriftyError, match="gain must have the 8 entries"):
        ops.rms_norm(torch.ones(2, 8), torch.ones(4))
    with pytest.raises(ThriftyError, match="drop the gain"):
        ops.quantize_per_token(torch.ones(2, 8), torch.ones(8), norm=False)
