import numpy as np
import pytest
import torch

from thrifty.errors import ThriftyError
from thrifty.train.blocks import PackedBlocks

STREAMS = {"a": np.arange(1000, dtype=np.int32), "b": np.arange(2000, 2050, dtype=np.int32)}
EVEN = ((0.0, {"a": 1.0, "b": 1.0}),)


def test_blocks_are_contiguous_pieces():
    for block in PackedBlocks(STREAMS, EVEN, 16, 200, 0):
        tokens = block["input_ids"]
        assert torch.equal(tokens, torch.arange(int(tokens[0]), int(tokens[0]) + 16))
        assert torch.equal(tokens, block["labels"])


def test_the_seed_decides_the_order():
    one, same, other = (PackedBlocks(STREAMS, EVEN, 16, 50, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))


def test_the_mixture_moves_over_the_run():
    blocks = PackedBlocks(STREAMS, ((0.0, {"a": 1.0}), (1.0, {"b": 1.0})), 16, 1000, 0)
    assert (blocks.drawn[:100] == 0).mean() > 0.85
    assert (blocks.drawn[-100:] == 1).mean() > 0.85
    assert 0.4 < blocks.drawn.mean() < 0.6


def test_a_reading_shows_every_piece_once():
    blocks = PackedBlocks({"a": STREAMS["a"]}, ((0.0, {"a": 1.0}),), 10, 99, 0)
    assert len(np.unique(blocks.first)) == 99


@pytest.mark.parametrize("size", [16, 17])
def test_a_text_of_one_block_serves(size):
    blocks = PackedBlocks({"a": np.arange(size)}, ((0.0, {"a": 1.0}),), 16, 5, 0)
    assert len(blocks) == 5
    assert len(blocks[4]["input_ids"]) == 16


def test_a_short_text_is_named():
    with pytest.raises(ThriftyError, match=r"'b' must hold at least one sequence of 64 tokens; got 50"):
        PackedBlocks(STREAMS, EVEN, 64, 10, 0)


def test_a_short_text_without_a_share_does_not_matter():
    assert len(PackedBlocks(STREAMS, ((0.0, {"a": 1.0}),), 64, 10, 0)) == 10


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ThriftyError, match="must give some of a, b a share"):
        PackedBlocks(STREAMS, ((0.0, {"c": 1.0}),), 16, 10, 0)
