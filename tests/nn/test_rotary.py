import torch

from thrifty import nn


def test_tables_stay_float32_in_a_model_that_is_cast():
    rotary = nn.RotaryEmbedding(8, 64)
    before = rotary.cos.clone()
    assert torch.equal(rotary.to(torch.bfloat16).cos, before)
    assert torch.equal(rotary.double().cos, before)
    assert rotary.state_dict() == {}


def test_has_shapes_on_the_meta_device():
    with torch.device("meta"):
        rotary = nn.RotaryEmbedding(8, 64)
    assert rotary.cos.is_meta
    assert rotary.to_empty(device="cpu").cos.shape == (64, 4)


def test_takes_positions_of_any_shape():
    cos, _ = nn.RotaryEmbedding(8, 64)(torch.tensor([[3, 4], [0, 63]]))
    assert cos.shape == (2, 2, 4)
    assert (cos[1, 0] == 1).all()
