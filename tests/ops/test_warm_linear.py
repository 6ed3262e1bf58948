import numpy as np
import pytest
import torch
from torch.nn import functional as F

from thrifty import ops, spec
from thrifty.errors import ThriftyError
from thrifty.nn import BitLinear

SHARES = (0.0, 0.3, 1.0)


def layer(share: float | None, **options) -> BitLinear:
    torch.manual_seed(0)
    made = BitLinear(63, 17, **options)
    made.quantization = None if share is None else torch.tensor(share)
    return made


@pytest.mark.parametrize("kind", ["ternary", "binary"])
@pytest.mark.parametrize("share", SHARES)
def test_is_the_product_of_the_spec(kind, share):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 63)).astype(np.float32)
    x[0], x[1] = 0, 3e8
    weight, bias = rng.standard_normal((17, 63)).astype(np.float32), rng.standard_normal(17).astype(np.float32)
    expected = spec.warm_linear(x, weight, bias, share, kind)
    given = torch.from_numpy(x).view(1, 5, 63), torch.from_numpy(weight), torch.from_numpy(bias)
    y = ops.warm_linear(*given, torch.tensor(share), kind)[0].numpy()
    for row, wanted in zip(y, expected, strict=True):
        np.testing.assert_allclose(row, wanted, atol=spec.TOLERANCES["float32"] * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_none_is_the_dense_layer_to_the_bit(dtype):
    x = torch.randn(4, 63, dtype=dtype)
    cold = layer(0.0, norm=None, dtype=dtype)
    assert torch.equal(cold(x), F.linear(x, cold.weight, cold.bias))


@pytest.mark.parametrize("autocast", [False, True])
def test_all_of_it_is_the_quantised_layer(autocast):
    x = torch.randn(2, 4, 63)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        warm, quantised = layer(1.0)(x), layer(None)(x)
    assert warm.dtype == quantised.dtype == (torch.bfloat16 if autocast else torch.float32)
    tolerance = spec.TOLERANCES[str(warm.dtype).removeprefix("torch.")] * quantised.abs().max().item()
    torch.testing.assert_close(warm, quantised, rtol=0, atol=tolerance)


@pytest.mark.parametrize("share", SHARES)
def test_gradients_go_straight_through(share):
    x = torch.randn(4, 63, requires_grad=True)
    made = layer(share, norm=None)
    g = torch.randn(4, 17)
    made(x).backward(g)
    with torch.no_grad():
        (w_codes, w_scale), (x_codes, x_scales) = (
            ops.quantize_weight(made.weight),
            ops.quantize_per_token(x, norm=False),
        )
        w = torch.lerp(made.weight, w_codes * w_scale, share)
        x_warm = torch.lerp(x, x_codes * x_scales[:, None], share)
    torch.testing.assert_close(x.grad, g @ w)
    torch.testing.assert_close(made.weight.grad, g.T @ x_warm)
    assert made.bias is not None
    torch.testing.assert_close(made.bias.grad, g.sum(0))


def test_what_does_not_fit_is_refused():
    share = torch.tensor(0.5)
    with pytest.raises(ThriftyError, match="kind must be one of ternary, binary; got 'int4'"):
        ops.warm_linear(torch.ones(1, 4), torch.ones(3, 4), None, share, "int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ThriftyError, match="x must have 4 features; got 5"):
        ops.warm_linear(torch.ones(1, 5), torch.ones(3, 4), None, share)
