import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from thrifty import nn, ops, spec
from thrifty.errors import ThriftyError
from thrifty.nn.linear import normalize
from thrifty.nn.packing import StoredBitLinear

SIZES = [(1, 1), (3, 500), (63, 257), (257, 63), (500, 3)]


def network(weight: ops.Kind = "ternary", cols=63, rows=257) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        nn.BitLinear(cols, rows, weight=weight),
        torch.nn.ReLU(),
        nn.BitLinear(rows, cols, False, weight=weight, norm=None),
    )


def packed_layer(*arguments, **options) -> nn.PackedBitLinear:
    layer: Any = nn.pack(nn.BitLinear(*arguments, **options))
    return layer


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_layer_of_too_many_inputs_is_refused():
    with pytest.raises(ThriftyError, match=r"\[pack\] .* at most 262144 columns.*; got 262145; split it"):
        packed_layer(2**18 + 1, 1)


@pytest.mark.parametrize("weight", ["ternary", "binary"])
@pytest.mark.parametrize(("cols", "rows"), SIZES)
def test_packing_changes_no_bit_of_the_output(weight, cols, rows):
    model, x = network(weight, cols, rows), torch.randn(2, 5, cols)
    packed = nn.pack(model)
    assert torch.equal(packed(x), model(x))
    unpacked = nn.unpack(packed)
    assert torch.equal(unpacked(x), model(x))
    assert same(nn.pack(unpacked), packed)
    unpacked(x).sum().backward()
    assert unpacked[0].weight.grad is not None


def test_packing_copies_and_leaves_the_original():
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    packed = nn.pack(model)
    assert nn.is_packed(packed)
    assert not nn.is_packed(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not packed[0].training
    assert list(packed.parameters()) == []
    assert isinstance(nn.pack(model[0]), nn.PackedBitLinear)


def test_a_predicate_chooses_the_leaves():
    packed = nn.pack(network(), lambda name, module: name == "2")
    assert isinstance(packed[0], nn.BitLinear)
    assert isinstance(packed[2], nn.PackedBitLinear)


def test_a_shared_layer_stays_shared():
    layer = nn.BitLinear(8, 8)
    packed = nn.pack(torch.nn.Sequential(layer, layer))
    assert packed[0] is packed[1]


def test_holds_two_bits_a_weight():
    packed = nn.pack(nn.BitLinear(512, 512, bias=False))
    assert sum(t.numel() * t.element_size() for t in packed.buffers()) == 512 * 512 // 4 + 2


@pytest.mark.parametrize("weight", ["ternary", "binary"])
@pytest.mark.parametrize(("cols", "rows"), SIZES)
def test_state_dict_has_transformers_layout(weight, cols, rows):
    layer = nn.BitLinear(cols, rows, weight=weight)
    packed: Any = nn.pack(layer)
    state = packed.state_dict()
    assert state["weight"].shape == (-(-rows // 4), cols)
    assert np.array_equal(state["weight"].numpy(), spec.pack(spec.ROW_BLOCK, packed.codes().numpy()))
    assert (state["weight_scale"].dtype, state["weight_scale"].shape) == (torch.bfloat16, (1,))
    other = nn.pack(nn.BitLinear(cols, rows, weight=weight))
    assert other.load_state_dict(state).missing_keys == []
    assert same(other, packed)
    x = torch.randn(2, cols)
    assert torch.equal(other(x), layer(x))


def test_transformers_unpacks_what_we_pack():
    packed = packed_layer(20, 12, bias=False)
    stored, scale = packed.state_dict()["weight"], packed.state_dict()["weight_scale"]
    # The four fields of a byte hold rows r, R + r, 2 R + r, 3 R + r.
    fields = torch.cat([(stored >> (2 * i)) & 3 for i in range(4)])
    assert torch.equal(fields.to(torch.int8) - 1, packed.codes())
    assert scale == packed.weight_scale


def test_a_damaged_state_is_refused():
    packed = nn.pack(nn.BitLinear(8, 8))
    state = packed.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({k: v for k, v in state.items() if k != "weight"})
    with pytest.raises(RuntimeError, match="8 x 8 weights"):
        packed.load_state_dict({**state, "weight": state["weight"][:1]})
    with pytest.raises(RuntimeError, match="weight: "):
        packed.load_state_dict({**state, "weight": torch.full_like(state["weight"], 255)})


def test_the_stored_form_becomes_the_packed_one():
    layer = nn.BitLinear(20, 13)
    packed = nn.pack(layer)
    stored = StoredBitLinear(layer)
    stored.load_state_dict(packed.state_dict())
    assert same(stored.to_packed(), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_does_not_touch_the_scale(dtype):
    packed = packed_layer(64, 8, bias=False)
    scale = packed.weight_scale.clone()
    assert torch.equal(packed.to(dtype).weight_scale, scale)
    assert packed.weight_scale.dtype == torch.bfloat16


def test_copies_pickles_and_saves():
    packed, x = nn.pack(network()), torch.randn(2, 63)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), packed(x))
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    other = nn.pack(network())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), packed(x))


def test_dtype_and_autocast_are_those_of_the_latent_layer():
    layer, x = nn.BitLinear(63, 8), torch.randn(2, 63)
    packed = nn.pack(layer)
    low, low_packed = copy.deepcopy(layer).bfloat16(), nn.pack(copy.deepcopy(layer).bfloat16())
    assert torch.equal(low(x.bfloat16()), low_packed(x.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == layer(x).dtype == torch.bfloat16


def test_the_packed_layer_compiles():
    packed, x = nn.pack(nn.BitLinear(63, 8)), torch.randn(2, 63)
    assert torch.equal(torch.compile(packed, backend="eager", fullgraph=True)(x), packed(x))


@pytest.mark.parametrize("codes", [torch.zeros(4, 8), torch.eye(8), -torch.eye(8), torch.ones(4, 8)])
@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.75, 300.0])
def test_unpacking_keeps_codes_and_scale(codes, scale):
    packed = nn.PackedBitLinear(codes.to(torch.int8), torch.tensor(scale).bfloat16())
    if not codes.any():
        with pytest.raises(ThriftyError, match="run it packed"):
            nn.unpack(packed)
        return
    assert same(nn.pack(nn.unpack(packed)), packed)


def test_a_layer_of_zeros_survives_the_round_trip():
    layer = nn.BitLinear(8, 4)
    torch.nn.init.zeros_(layer.weight)
    packed = nn.pack(layer)
    assert same(nn.pack(nn.unpack(packed)), packed)


def test_a_scale_that_bfloat16_does_not_hold_is_kept_in_float32():
    scale = torch.tensor([0.1])
    packed = nn.PackedBitLinear(torch.eye(8, dtype=torch.int8), scale)
    assert torch.equal(packed.to(torch.bfloat16).weight_scale, scale)
    state = packed.state_dict()
    other = packed_layer(8, 8, bias=False)
    other.load_state_dict(state)
    assert torch.equal(other.weight_scale, scale)
    stored = StoredBitLinear(nn.BitLinear(8, 8, bias=False))
    stored.load_state_dict(state)
    assert torch.equal(stored.to_packed().weight_scale, scale)
    with pytest.raises(ThriftyError, match="run it packed"):
        nn.unpack(packed)


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan])
def test_what_is_no_scale_is_refused(scale):
    with pytest.raises(ThriftyError, match="finite number above 0"):
        nn.PackedBitLinear(torch.ones(1, 4, dtype=torch.int8), torch.tensor(scale))
    packed = packed_layer(8, 8)
    with pytest.raises(RuntimeError, match=r"weight_scale: .*finite number above 0"):
        packed.load_state_dict({**packed.state_dict(), "weight_scale": torch.tensor([scale])})


def test_an_input_of_another_width_is_refused():
    packed = packed_layer(64, 17, norm=None)
    for cols in (0, 1, 63, 80, 4096):
        with pytest.raises(ThriftyError, match=f"x must have 64 features; got {cols}"), torch.no_grad():
            packed(torch.randn(2, cols))


def test_tensors_without_memory_pass_through_a_packed_layer():
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = packed_layer(63, 17)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert packed(torch.randn(2, 63)).shape == (2, 17)


def test_tells_the_shape_and_dtype_of_the_weight_it_was():
    packed = packed_layer(20, 12, bias=False)
    assert (packed.weight.shape, packed.weight.dtype) == ((12, 20), torch.float32)
    assert packed.weight.untyped_storage().nbytes() == 4
    assert packed.weight.isnan().all()
    assert copy.deepcopy(packed).bfloat16().weight.dtype == torch.bfloat16
    low: Any = nn.pack(nn.BitLinear(20, 12, bias=False).bfloat16())
    assert low.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["rms", "layer", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_has_the_bits_of_the_ops(norm, dtype):
    packed = packed_layer(63, 17, norm=norm).to(dtype)
    x = torch.randn(2, 5, 63).to(dtype)
    codes, scales = ops.quantize_per_token(normalize(x, norm).flatten(0, -2), norm=False)
    products = ops.ternary_matmul(codes, scales, packed.packed, 17, packed.weight_scale.float(), packed.bias)
    y = products.to(dtype).view(2, 5, 17)
    assert torch.equal(packed(x.requires_grad_()), y)
    with torch.no_grad():
        assert torch.equal(packed(x), y)
        assert torch.equal(packed(x.transpose(0, 1)), y.transpose(0, 1))
        assert packed(x[:0]).shape == (0, 5, 17)


def test_says_what_it_is():
    assert "weight='ternary', norm='rms', bytes=64" in repr(nn.pack(nn.BitLinear(8, 4)))
