"""transformers' own BitNet layers on the native kernels: their outputs, their files."""

import copy
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import BitNetQuantConfig

from thrifty import native
from thrifty.errors import ThriftyError
from thrifty.nn import NativeBitLinear, use_native_kernels

with warnings.catch_warnings():
    # torch's own compiler, loaded by the decorators of this module, uses what torch deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers.integrations import bitnet as theirs

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="needs the native library"),
    pytest.mark.usefixtures("eager_bitnet"),
]

#: linear_class, quantization_mode
CONVENTIONS = [("bitlinear", "offline"), ("autobitlinear", "offline"), ("autobitlinear", "online")]


def layer(linear_class: str, mode: str, bias: bool, norm: bool, dtype: torch.dtype, cols=63, rows=20) -> Any:
    """A layer of transformers with random codes, or random master weights."""
    torch.manual_seed(0)
    options: Any = {"use_rms_norm": norm, "rms_norm_eps": 1e-5, "dtype": dtype}
    codes = torch.randint(-1, 2, (rows, cols))
    if linear_class == "bitlinear":
        found: Any = theirs.BitLinear(cols, rows, bias, **options)
        found.weight.copy_(theirs.pack_weights(codes))
    else:
        found = theirs.AutoBitLinear(cols, rows, bias, online_quant=mode == "online", **options)
        with torch.no_grad():
            found.weight.copy_(torch.randn(rows, cols) if mode == "online" else codes)
    with torch.no_grad():
        if mode == "offline":
            found.weight_scale.fill_(0.3)  # in float32 no number of bfloat16
        if bias:
            found.bias.copy_(torch.randn(rows))
        if norm:
            found.rms_norm.weight.copy_(torch.rand(cols) + 0.5)
            found.rms_norm.to(dtype)
    return found.eval()


def swapped(module: nn.Module) -> Any:
    model = nn.ModuleDict({"layer": copy.deepcopy(module)})
    use_native_kernels(model)
    return model["layer"]


@pytest.mark.parametrize(("linear_class", "mode"), CONVENTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", [(63,), (3, 63), (2, 5, 63), (0, 63)])
def test_float32_layers_answer_alike(linear_class, mode, bias, norm, shape):
    module = layer(linear_class, mode, bias, norm, torch.float32)
    x = torch.randn(shape)
    with torch.no_grad():
        if linear_class == "bitlinear" and bias and len(shape) != 2:
            expected = module(x.reshape(-1, 63)).reshape(*shape[:-1], 20)  # its bias wants two dimensions
        else:
            expected = module(x)
        y = swapped(module)(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("linear_class", "mode"), CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_floats_differ_by_their_rounding(linear_class, mode, dtype):
    module = layer(linear_class, mode, False, False, dtype)
    ours = swapped(module)
    x = torch.randn(40, 63).to(dtype)
    with torch.no_grad():
        y, expected = ours(x), module(x)
        assert y.dtype == expected.dtype == dtype
        # Not compiled, `BitLinear` rounds every product, which moves a code by one here and there.
        assert (y - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_bitlinear_in_bfloat16_has_the_codes_that_its_compiled_quantizer_takes():
    # Compiled, it rounds the scale and nothing else: here spelled out, as that takes seconds to compile.
    module = layer("bitlinear", "offline", False, False, torch.bfloat16, cols=64, rows=64)
    with torch.no_grad():
        module.weight.copy_(theirs.pack_weights(torch.eye(64)))
        module.weight_scale.fill_(1)
        x = torch.randn(50, 64).bfloat16()
        scale = (127 / x.float().abs().amax(-1, keepdim=True)).bfloat16().float()
        codes = (x.float() * scale).round().clamp(-128, 127)
        assert torch.equal(swapped(module)(x), (codes * (1 / scale)).bfloat16())


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [63, 64])
def test_rows_of_zeros_no_rows_and_other_widths(linear_class, dtype, cols):
    ours = swapped(layer(linear_class, "offline", False, False, dtype, cols=cols))
    with torch.no_grad():
        assert torch.equal(ours(torch.zeros(2, 3, cols, dtype=dtype)), torch.zeros(2, 3, 20, dtype=dtype))
        assert ours(torch.zeros(2, 0, cols, dtype=dtype)).shape == (2, 0, 20)
        x = torch.randn(5, cols).to(dtype)
        assert torch.equal(ours(x)[2:3], ours(x[2:3]))
        for other in (1, cols - 1, cols + 1):
            with pytest.raises(ThriftyError, match=f"x must have {cols} features; got {other}"):
                ours(torch.zeros(2, other, dtype=dtype))


def test_integers_are_exact():
    module = layer("autobitlinear", "offline", False, False, torch.float32)
    with torch.no_grad():
        module.weight_scale.fill_(127)
        x = torch.randint(-127, 128, (9, 63)).float()
        x[:, 0] = 127
        assert torch.equal(swapped(module)(x) / 127, x @ module.weight.T)


def make(linear_class: str, mode: str, dtype: torch.dtype, tmp_path) -> Any:
    """A small BitNet that transformers itself loaded from a folder that it had written."""
    torch.manual_seed(0)
    config = transformers.BitNetConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    record = BitNetQuantConfig(
        linear_class=linear_class, quantization_mode=mode, modules_to_not_convert=["lm_head"], use_rms_norm=True
    )
    kind: Any = transformers.BitNetForCausalLM
    model = kind(config).to(dtype)
    theirs.replace_with_bitnet_linear(model, ["lm_head"], record)
    for name, module in model.named_modules():
        if isinstance(module, theirs.BitLinear | theirs.AutoBitLinear):
            bias, norm = getattr(module, "bias", None) is not None, module.rms_norm is not None
            fresh = layer(linear_class, mode, bias, norm, dtype, module.in_features, module.out_features)
            model.set_submodule(name, fresh)
    model.config.quantization_config = record
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


IDS = torch.arange(3, 23)[None]


@pytest.mark.parametrize(("linear_class", "mode"), CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_answers_alike_and_its_folder_is_one_for_plain_transformers(linear_class, mode, dtype, tmp_path):
    model = make(linear_class, mode, dtype, tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
        record = use_native_kernels(model)
        logits = model(IDS).logits
    assert len(record.replaced) == 14
    assert str(record.replaced[0].note) == (
        "divides by its scale" if linear_class == "bitlinear" else "multiplies by its scale"
    )
    close = 1e-3 if dtype == torch.float32 else 0.05
    spread = (expected.max() - expected.min()).item()
    assert (logits - expected).abs().max() <= close * spread
    model.save_pretrained(tmp_path / "ours")
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype).eval()
    assert not any(isinstance(m, NativeBitLinear) for m in plain.modules())
    with torch.no_grad():
        again = plain(IDS).logits
    if mode == "offline":
        assert torch.equal(again, expected)
    else:
        assert (again - expected).abs().max() <= close * spread
    described = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert (described["linear_class"], described["quantization_mode"]) == (linear_class, "offline")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    options: Any = {"max_new_tokens": 8, "do_sample": False}
    if dtype == torch.float32:
        assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


@pytest.mark.parametrize(("linear_class", "mode"), CONVENTIONS)
def test_states_go_back_and_forth(linear_class, mode):
    module = layer(linear_class, mode, True, True, torch.float32)
    ours = swapped(module)
    other = copy.deepcopy(ours)
    other.packed.zero_()
    other.weight_scale.fill_(7)
    other.bias.zero_()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(4, 63)
    with torch.no_grad():
        assert torch.equal(other(x), ours(x))
        assert torch.equal(copy.deepcopy(ours).to(torch.bfloat16).weight_scale, ours.weight_scale)
    if mode == "offline" and linear_class == "autobitlinear":
        other.load_state_dict(module.state_dict())
        with torch.no_grad():
            assert torch.equal(other(x), ours(x))
    assert (ours.weight.shape, ours.weight.dtype) == ((20, 63), torch.float32)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({"weight_scale": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"must be finite and not 0; got 0\.0"):
        ours.load_state_dict({**ours.state_dict(), "weight_scale": torch.zeros(1)})


def test_a_native_layer_is_copied_and_pickled():
    ours = swapped(layer("bitlinear", "offline", True, True, torch.float32))
    x = torch.randn(4, 63)
    with torch.no_grad():
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x), ours(x))
            assert other.state_dict().keys() == ours.state_dict().keys()


def test_rows_that_four_does_not_divide_are_stored_as_transformers_reads_them():
    module = layer("autobitlinear", "offline", False, False, torch.float32, rows=21)
    state = swapped(module).state_dict()
    assert torch.equal(state["weight"], module.weight)


def test_memory_falls_and_shared_layers_stay_shared():
    module = layer("autobitlinear", "offline", False, False, torch.float32, cols=256, rows=256)
    model = nn.Sequential(module, nn.ReLU(), module)
    record = use_native_kernels(model)
    assert model[0] is model[2]
    assert len(record.replaced) == 1
    assert record.bytes_before == 256 * 256 * 4 + 4
    assert record.bytes_packed == 256 * 256 // 4 + 4
    assert "16.0 times smaller" in str(record)


def test_hooks_stay_on_a_layer():
    theirs: Any = layer("bitlinear", "offline", False, False, torch.float32)
    model, seen = nn.Sequential(theirs), []
    theirs.register_forward_hook(lambda *_: seen.append("after"))
    theirs.register_forward_pre_hook(lambda *_: seen.append("before"))
    use_native_kernels(model)
    model(torch.randn(2, theirs.in_features))
    assert seen == ["before", "after"]


def test_a_scale_of_another_shape_is_told():
    module: Any = layer("bitlinear", "offline", False, False, torch.float32)
    module.weight_scale = torch.ones(2)
    with pytest.raises(ThriftyError, match=r"must be one number; got shape \(2,\), in the layer 'inner'"):
        use_native_kernels(nn.ModuleDict({"inner": module}))


def damaged(scale: float = 1.0, weight: float = 1.0) -> Any:
    module = layer("autobitlinear", "offline", False, False, torch.float32)
    with torch.no_grad():
        module.weight[0, 0] = weight
        module.weight_scale.fill_(scale)
    return nn.ModuleDict({"inner": module})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, r"must be a torch.nn.Module; got dict"),
        (nn.Sequential(nn.Linear(2, 2)), r"must have BitLinear or AutoBitLinear layers of transformers; got Linear;"),
        (nn.Sequential(nn.ReLU()), r"got no linear layer"),
        (damaged()["inner"], r"got such a layer itself; put it into a model"),
        (damaged().to("meta"), r"'inner' must be on the CPU; got meta"),
        (damaged(weight=0.5), r"must have -1, 0 and 1 .*master weights.*, in the layer 'inner'"),
        (damaged(weight=3.0), r"must have -1, 0 and 1 .*, in the layer 'inner'"),
        (damaged(scale=0.0), r"weight_scale must be finite and not 0; got 0.0, in the layer 'inner'"),
        (damaged(scale=float("nan")), r"weight_scale must be finite and not 0; got nan"),
    ],
)
def test_what_cannot_be_swapped_is_told(model, message):
    with pytest.raises(ThriftyError, match=message):
        use_native_kernels(model)


def test_a_packed_code_that_is_none_is_told():
    module = layer("bitlinear", "offline", False, False, torch.float32)
    module.weight[0, 0] = 255
    with pytest.raises(ThriftyError, match=r"in the layer 'inner'"):
        use_native_kernels(nn.ModuleDict({"inner": module}))
