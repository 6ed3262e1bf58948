import pytest
import torch

from thrifty import nn
from thrifty.errors import ThriftyError


def test_the_seeds_call():
    assert nn.BitFeedForward(512)(torch.randn(10, 512)).shape == (10, 512)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("post_act_norm", [False, True])
def test_options(activation, glu, post_act_norm):
    layer = nn.BitFeedForward(16, 24, 2, glu=glu, activation=activation, post_act_norm=post_act_norm, dropout=0.1)
    y = layer(torch.randn(2, 3, 16))
    assert y.shape == (2, 3, 24)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.up_proj.out_features == 32


def test_dropout_acts_in_training_only():
    layer = nn.BitFeedForward(16, dropout=0.5)
    x = torch.randn(2, 16)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_zero_init_output():
    assert not nn.BitFeedForward(16, zero_init_output=True)(torch.randn(2, 16)).any()


def test_wrong_options_are_refused():
    with pytest.raises(ThriftyError, match=r"silu, gelu, .* got 'swoosh'"):
        nn.BitFeedForward(16, activation="swoosh")
    with pytest.raises(ThriftyError, match="at least one hidden feature; got 0"):
        nn.BitFeedForward(16, mult=0)
