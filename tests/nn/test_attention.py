import pytest
import torch
from transformers import DynamicCache

from thrifty import nn
from thrifty.errors import ThriftyError


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, None), (4, 2, None), (4, 1, 10)])
def test_steps_equal_the_whole(heads, kv_heads, head_dim):
    torch.manual_seed(1)
    # Dense projections: an integer code cannot fall on the other side of a float's last bit.
    layer = nn.BitAttention(32, heads, kv_heads, head_dim, weight="dense", sub_norm=True).eval()
    rotary = nn.RotaryEmbedding(layer.head_dim, 16)
    x = torch.randn(2, 9, 32)
    whole = layer(x, rotary(torch.arange(9)[None]))
    cache = DynamicCache()
    steps = [layer(x[:, t : t + 1], rotary(torch.tensor([[t]])), None, cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)


def test_positions_matter_only_with_rotary():
    layer = nn.BitAttention(32, 4).eval()
    x = torch.randn(1, 5, 32)
    swapped = x[:, [1, 0, 2, 3, 4]]
    last = layer(x)[:, -1]
    torch.testing.assert_close(layer(swapped)[:, -1], last, rtol=1e-2, atol=1e-2)
    rotary = nn.RotaryEmbedding(8, 16)(torch.arange(5)[None])
    assert not torch.allclose(layer(swapped, rotary)[:, -1], layer(x, rotary)[:, -1], rtol=1e-2, atol=1e-2)


def test_is_causal():
    layer = nn.BitAttention(32, 4, 2).eval()
    x = torch.randn(1, 8, 32)
    y = layer(x)
    x[:, 5] += 1
    assert torch.equal(layer(x)[:, :5], y[:, :5])
    assert not torch.equal(layer(x)[:, 5:], y[:, 5:])


def test_group_heads_read_their_own_kv_head():
    layer = nn.BitAttention(32, 4, 2, weight="dense")
    with torch.no_grad():
        layer.v_proj.weight[:8].zero_()  # pyright: ignore
        layer.o_proj.weight.copy_(torch.eye(32))  # pyright: ignore
    y = layer(torch.randn(1, 6, 32))
    assert not y[..., :16].any()
    assert y[..., 16:].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 4, 3), "multiple of kv heads; got 4 and 3"),
        ((32, 5), "width 32 is not a multiple of 5 heads"),
        ((12, 4), "head_dim must be even.*got 3"),
        ((32, 0), "got 0 and 0"),
    ],
)
def test_heads_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ThriftyError, match=message):
        nn.BitAttention(*arguments)
