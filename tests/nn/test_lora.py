"""Adapters beside packed layers: the function, its gradients, and the way back into two bits."""

from typing import Any

import pytest
import torch

from thrifty import nn, ops
from thrifty.errors import ThriftyError

peft = pytest.importorskip("peft")
from thrifty.nn import lora  # noqa: E402
from thrifty.nn.linear import Norm, normalize  # noqa: E402


class Network(torch.nn.Module):
    """Low-bit layers under names that targets go by, and a dense one."""

    def __init__(self, norm: Norm = None, weight: ops.Kind = "ternary") -> None:
        super().__init__()
        self.up_proj = nn.BitLinear(63, 257, weight=weight, norm=norm)
        self.down_proj = nn.BitLinear(257, 63, False, weight=weight, norm=norm)
        self.dt_proj = torch.nn.Linear(63, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dt_proj(self.down_proj(torch.relu(self.up_proj(x))))


def adapted(model: torch.nn.Module, filled: bool = True, **options) -> Any:
    config = lora.adapter_config(model, 4, 8, **options)
    config.task_type = None
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if filled and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("weight", ["ternary", "binary"])
@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_output_and_gradients_are_those_of_a_dense_adapter(norm, weight):
    torch.manual_seed(0)
    packed: Any = nn.pack(nn.BitLinear(63, 257, weight=weight, norm=norm))
    model = adapted(torch.nn.ModuleDict({"up_proj": packed, "dt_proj": torch.nn.Linear(1, 1)}))
    layer = model.get_submodule("base_model.model.up_proj")
    a, b = (layer.get_submodule(f"lora_{name}.default").weight for name in "AB")
    x = torch.randn(2, 5, 63, requires_grad=True)
    wanted_x, wanted_a, wanted_b = (t.detach().clone().requires_grad_() for t in (x, a, b))
    # The definition, with weights as floats and the straight-through estimator spelled out.
    x_hat = normalize(wanted_x, norm)
    codes, scales = ops.quantize_per_token(x_hat, norm=False)
    dequantised = x_hat + (codes * scales[..., None] - x_hat).detach()
    base = torch.nn.functional.linear(dequantised, packed.codes() * packed.weight_scale.float(), packed.bias)
    wanted = base + 2 * (x_hat @ wanted_a.T @ wanted_b.T)
    y, g = layer(x), torch.randn(2, 5, 257)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    y.backward(g)
    wanted.backward(g)
    for got, expected in ((x, wanted_x), (a, wanted_a), (b, wanted_b)):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)
    assert layer.base_layer is packed


def test_gradients_flow_in_half_precision_and_through_wide_layers():
    layer: Any = nn.pack(nn.BitLinear(1030, 2050, norm="rms"))
    x = torch.randn(3, 1030, dtype=torch.bfloat16, requires_grad=True)
    exact = x.detach().float().requires_grad_()
    g = torch.randn(3, 2050).bfloat16()
    layer(x).backward(g)
    ops.rms_norm(exact).backward(g.float() @ (layer.codes() * layer.weight_scale.float()))
    assert x.grad is not None
    assert exact.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.float(), exact.grad, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(exact)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(torch.autograd.grad(y.float().sum(), exact)[0]).all()


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_an_adapter_of_zeros_merges_to_the_same_bits(weight):
    base = nn.pack(Network(weight=weight))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged, layers = lora.merge_adapter(adapted(base, filled=False))
    assert {name: (layer.flipped, layer.error, layer.lost) for layer in layers for name in [layer.name]} == {
        "up_proj": (0.0, 0.0, 0.0),
        "down_proj": (0.0, 0.0, 0.0),
    }
    assert before.keys() == merged.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_merging_takes_the_nearest_codes_and_reports_what_is_lost(weight):
    torch.manual_seed(0)
    model = adapted(nn.pack(Network(weight=weight)))
    layer = model.get_submodule("base_model.model.down_proj")
    before = layer.base_layer.codes()
    wanted = before * layer.base_layer.weight_scale.float() + layer.delta()
    merged, layers = lora.merge_adapter(model)
    codes, scale = merged.down_proj.codes(), merged.down_proj.weight_scale.float()
    report = next(layer for layer in layers if layer.name == "down_proj")
    assert isinstance(merged.down_proj, nn.PackedBitLinear)
    assert report.flipped is not None
    assert 0 < report.flipped < 1
    assert report.flipped == pytest.approx((codes != before).float().mean().item())
    assert report.error == pytest.approx(((codes * scale - wanted).norm() / wanted.norm()).item(), rel=1e-3)
    # No code moved by one, and no scale near it, is closer.
    others = [torch.where(wanted > 0, 1, -1)] if weight == "binary" else [codes + 1, codes - 1]
    own = (codes * scale - wanted).square()
    assert all((own <= (other.clamp(-1, 1) * scale - wanted).square() + 1e-9).all() for other in others)
    assert all(own.sum() <= (codes * scale * factor - wanted).square().sum() for factor in (0.98, 1.02))


def test_merging_can_be_undone():
    model = adapted(nn.pack(Network()))
    x = torch.randn(3, 63)
    before = model(x)
    model.merge_adapter()
    assert not torch.equal(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(model(x), before)
    with model.disable_adapter():
        assert not torch.equal(model(x), before)


def test_an_adapter_is_saved_in_peft_s_files_and_loaded_again(tmp_path):
    torch.manual_seed(0)
    base = nn.pack(Network())
    model = adapted(base).eval()
    x = torch.randn(3, 63)
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    again = lora.load_adapter(model.unload(), tmp_path)
    assert torch.equal(again(x), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_targets_are_layers_by_their_last_names():
    model = adapted(nn.pack(Network()), targets=["down_proj"])
    assert [name for name, _ in model.named_parameters() if "lora_A" in name] == [
        "base_model.model.down_proj.lora_A.default.weight"
    ]
    assert not isinstance(model.get_submodule("base_model.model.up_proj"), lora.LoraPackedLinear)
    with pytest.raises(ThriftyError, match="linear layers of the model; got q_proj; choose from down_proj, dt_proj"):
        lora.adapter_config(nn.pack(Network()), 4, 8, ["q_proj"])


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_a_requantized_adapter_computes_what_merging_gives_and_learns_as_one_that_is_added(weight):
    torch.manual_seed(0)
    model = adapted(nn.pack(Network(weight=weight)))
    layer = model.get_submodule("base_model.model.up_proj")
    a, b = (layer.get_submodule(f"lora_{name}.default").weight for name in "AB")
    x, g = torch.randn(5, 63, requires_grad=True), torch.randn(5, 257)
    wanted = torch.autograd.grad(layer(x), (a, b), g)
    layer.requantized = True
    y = layer(x)
    for got, expected in zip(torch.autograd.grad(y, (a, b), g, retain_graph=True), wanted, strict=True):
        torch.testing.assert_close(got, expected)
    (dx,) = torch.autograd.grad(y, x, g)
    layer.merge()
    base = layer.base_layer
    assert torch.equal(y, base(x))
    torch.testing.assert_close(dx, g @ (base.codes() * base.weight_scale.float()), rtol=1e-4, atol=1e-5)
