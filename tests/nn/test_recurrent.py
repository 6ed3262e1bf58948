"""MLGRU and SSD: the same layer, as a whole and step by step."""

from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache

from thrifty import nn
from thrifty.errors import ThriftyError

#: Dense projections: an integer code cannot fall on the other side of a float's last bit.
LAYERS = {
    "mlgru": lambda: nn.MLGRU(16, weight="dense", sub_norm=True),
    "ssd": lambda: nn.SSD(16, 4, chunk_len=4, weight="dense", sub_norm=True),
    "ssd-grouped": lambda: nn.SSD(16, 4, d_state=8, n_groups=2, chunk_len=3, skip=False, bias=False),
}


@pytest.fixture(params=LAYERS)
def layer(request) -> Any:
    torch.manual_seed(0)
    layer = LAYERS[request.param]().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def rotary(layer: Any, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    return nn.RotaryEmbedding(getattr(layer, "state_dim", 4), 32)(torch.arange(start, stop)[None])


def cache() -> Any:
    return Cache(layers=[nn.RecurrentLayer()])


def test_steps_and_chunks_equal_the_whole(layer):
    x = torch.randn(2, 13, 16)
    whole = layer(x, rotary(layer, 0, 13))
    for sizes in ([1] * 13, [5, 1, 7], [12, 1]):
        kept, parts, at = cache(), [], 0
        for part in x.split(sizes, 1):
            parts.append(layer(part, rotary(layer, at, at + part.shape[1]), None, kept))
            at += part.shape[1]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        assert kept.get_seq_length() == 13


def test_the_state_does_not_grow(layer):
    kept = cache()
    layer(torch.randn(2, 3, 16), None, None, kept)
    state: Any = kept.layers[0]
    size = state.state.numel()
    layer(torch.randn(2, 50, 16), None, None, kept)
    assert state.state.numel() == size


def test_padding_leaves_the_state_untouched(layer):
    x = torch.randn(2, 9, 16)
    mask = torch.tensor([[False] * 4 + [True] * 5, [True] * 9])
    alone = layer(x[:1, 4:])
    kept = cache()
    first = layer(x[:, :6], None, mask[:, :6], kept)
    rest = layer(x[:, 6:], None, mask, kept)
    torch.testing.assert_close(torch.cat([first, rest], 1)[:1, 4:], alone, rtol=1e-4, atol=1e-5)
    # Padding on the right: the state is that of the last token before it.
    ended, shorter = cache(), cache()
    layer(x, None, mask.flip(1), ended)
    layer(x[:1, :5], None, None, shorter)
    torch.testing.assert_close(ended.layers[0].state[:1], shorter.layers[0].state, rtol=1e-4, atol=1e-5)


def test_rows_are_reordered_repeated_and_selected(layer):
    x = torch.randn(3, 6, 16)
    whole = layer(x)
    for change, order in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        kept = cache()
        layer(x[:, :5], None, None, kept)
        change(kept)
        torch.testing.assert_close(layer(x[order, 5:], None, None, kept), whole[order, 5:], rtol=1e-4, atol=1e-5)


def test_a_reset_cache_is_a_new_one(layer):
    x, kept = torch.randn(1, 4, 16), cache()
    first = layer(x, None, None, kept)
    kept.reset()
    assert kept.get_seq_length() == 0
    assert torch.equal(layer(x, None, None, kept), first)


def test_what_a_state_cannot_do_is_refused(layer):
    kept = cache()
    layer(torch.randn(1, 4, 16), None, None, kept)
    kept.crop(0)
    with pytest.raises(ThriftyError, match="cannot give tokens back"):
        kept.crop(1)
    with pytest.raises(ThriftyError, match="holds a state; got keys"):
        kept.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)
    with pytest.raises(ThriftyError, match="needs a RecurrentLayer; got nothing"):
        layer(torch.randn(1, 4, 16), None, None, DynamicCache())
    with pytest.raises(ThriftyError, match="padding mask must be boolean"):
        layer(torch.randn(1, 4, 16), None, torch.ones(1, 4))
    assert not kept.is_croppable


def test_positions_turn_ssds_keys():
    layer = nn.SSD(16, 4).eval()
    x = torch.randn(1, 5, 16)
    assert not torch.allclose(layer(x), layer(x, rotary(layer, 0, 5)), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer(x, rotary(layer, 7, 12)), layer(x, rotary(layer, 0, 5)), rtol=1e-3, atol=1e-4)


def test_old_tokens_are_forgotten_not_amplified():
    layer: Any = nn.SSD(16, 4).eval()
    kept = cache()
    layer(torch.randn(1, 5, 16), None, None, kept)
    with torch.no_grad():
        before = kept.layers[0].state.abs().max()
        layer(torch.zeros(1, 200, 16), None, None, kept)
    assert (
        kept.layers[0].state.abs().max() <= before + layer.x_proj.bias.abs().max() * layer.b_proj.bias.abs().max() * 2
    )


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_ternary_projections_pack(weight):
    for layer in (nn.MLGRU(16, weight=weight), nn.SSD(16, 4, weight=weight)):
        x = torch.randn(2, 5, 16)
        packed = nn.pack(layer)
        assert torch.equal(packed(x), layer(x))
        assert sum(isinstance(m, nn.PackedBitLinear) for m in packed.modules()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((16, 3), "n_heads must divide"), ((16, 4, 4, 3), "n_groups divide"), ((16, 4, 4, 4, 0), "chunk_len")],
)
def test_sizes_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ThriftyError, match=message):
        nn.SSD(*arguments)
