import pytest
import torch

from thrifty import native, nn, ops
from thrifty.errors import ThriftyError
from thrifty.nn.linear import ExactLinear


def test_is_a_drop_in_for_a_linear_layer():
    layer = nn.BitLinear(512, 400)
    assert layer(torch.randn(10, 512)).shape == (10, 400)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (400, 512), "bias": (400,)}
    layer.load_state_dict(torch.nn.Linear(512, 400).state_dict())
    assert nn.BitLinear(4, 3, False).bias is None


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_norms_come_before_the_product(weight):
    x = torch.randn(3, 20)
    for norm, normalised in {
        "rms": ops.rms_norm(x),
        "layer": torch.nn.functional.layer_norm(x, (20,)),
        None: x,
    }.items():
        layer = nn.BitLinear(20, 7, weight=weight, norm=norm)  # pyright: ignore[reportArgumentType]
        assert torch.equal(layer(x), ops.bit_linear(normalised, layer.weight, layer.bias, weight))


def test_its_output_does_not_depend_on_the_scale_of_its_input():
    # The seed's norm is off by a factor d, so its layers vanish beside the residual.
    layer = nn.BitLinear(512, 512, bias=False)
    x = torch.randn(4, 512)
    y = layer(x)
    torch.testing.assert_close(layer(1000 * x), y, rtol=2e-2, atol=2e-2)
    assert 0.1 < y.std() < 10


def test_learns():
    torch.manual_seed(0)
    layer = nn.BitLinear(16, 4)
    x, target = torch.randn(64, 16), torch.randn(64, 4)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_weights_have_the_dtype_asked_for(dtype):
    layer = nn.BitLinear(8, 4, dtype=dtype)
    y = layer(torch.randn(2, 8, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype


def test_says_what_it_is():
    assert "weight='binary', norm=None" in repr(nn.BitLinear(8, 4, weight="binary", norm=None))


def test_wrong_choices_are_refused():
    with pytest.raises(ThriftyError, match="weight must be one of ternary, binary; got 'int4'"):
        nn.BitLinear(8, 4, weight="int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ThriftyError, match="norm must be 'rms', 'layer' or None; got 'batch'"):
        nn.BitLinear(8, 4, norm="batch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ThriftyError, match="one of ternary, binary, dense; got 'sparse'"):
        nn.make_linear("sparse", 8, 4, True)  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not native.available(), reason="no native library")
@pytest.mark.parametrize("shape", [(256, 128), (512, 40)])
def test_an_exact_row_does_not_depend_on_the_others(shape):
    torch.manual_seed(0)
    layer, x = ExactLinear(*shape), torch.randn(60, shape[0])
    torch.testing.assert_close(layer(x).detach(), torch.nn.Linear.forward(layer, x).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        whole = layer(x)
        assert all(torch.equal(layer(row), y) for row, y in zip(x.split(1), whole.split(1), strict=True))
