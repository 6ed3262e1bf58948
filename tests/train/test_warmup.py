from itertools import pairwise
from typing import Any

import pytest
import torch

from thrifty.models import BitNetConfig, BitNetForCausalLM
from thrifty.models.decoder import DecoderLayer
from thrifty.nn import BitLinear
from thrifty.train.recipe import CURVES
from thrifty.train.warmup import quantization_share, set_quantization

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def model() -> Any:
    torch.manual_seed(0)
    return BitNetForCausalLM(BitNetConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1))


@pytest.mark.parametrize("curve", CURVES)
def test_every_curve_rises_from_none_to_all(curve):
    shares = [quantization_share(step / 100, curve) for step in range(140)]
    assert shares[0] == 0
    assert shares[100:] == [1.0] * 40
    rises = [b - a for a, b in pairwise(shares[:101])]
    # No jump at either end.
    assert 0 <= min(rises) <= max(rises) < 0.1


def test_curves_are_those_that_were_published():
    assert quantization_share(0.25) == 0.25
    assert quantization_share(0.25, "exponential", 4) == 1 - 0.75**4
    steep = 1 / (1 + torch.tensor(40 * 0.1).exp())
    assert quantization_share(0.4, "sigmoid", 40) == pytest.approx(steep.item(), abs=1e-6)


def test_a_model_goes_from_dense_to_quantised_and_back_to_its_own_layers():
    made, tokens = model(), torch.arange(20)[None]
    layers = [module for module in made.modules() if isinstance(module, BitLinear)]
    with torch.no_grad():
        quantised = made(tokens).logits
        set_quantization(made, 0.0)
        shared = layers[0].quantization
        dense = made(tokens).logits
        set_quantization(made, 0.5)
        assert all(layer.quantization is shared for layer in layers)
        between = made(tokens).logits
        set_quantization(made, 1.0)
        assert torch.equal(made(tokens).logits, quantised)
    assert all(layer.quantization is None for layer in layers)
    apart = (dense - quantised).abs().max()
    assert (between - dense).abs().max() > 0
    assert apart > 0.1


def test_compiled_layers_serve_every_share():
    made, tokens = model().train(), torch.arange(20)[None]
    counts = []

    def backend(graph, _):
        counts.append(1)
        return graph

    compiled = torch.compile(DecoderLayer.forward, backend=backend, dynamic=False)
    x = made.model.embed_tokens(tokens).detach().requires_grad_()
    rotary = made.model.rotary_emb(torch.arange(20)[None])
    outputs = []
    for share in (0.0, 0.25, 0.5):
        set_quantization(made, share)
        outputs.append(compiled(made.model.layers[0], x, rotary))
        torch.testing.assert_close(outputs[-1], made.model.layers[0](x, rotary), rtol=1e-3, atol=1e-3)
        if share == 0:
            first = len(counts)
    assert len(counts) == first
    assert not torch.allclose(outputs[0], outputs[1])
