"""From one form of files to another and back: the same codes and scales, and logits as transformers has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.suite import QUANTISED, small_model
from tiny_checkpoints import PACKED, write_checkpoint
from transformers_folders import transformers_model

from thrifty import ThriftyError
from thrifty.checkpoint import Tensor, open_folder, open_safetensors, save_safetensors
from thrifty.checkpoint.folder import reciprocal
from thrifty.convert import to_transformers
from thrifty.models import save_packed
from thrifty.runtime import load

pytestmark = pytest.mark.usefixtures("eager_bitnet")
TOKENS = np.random.default_rng(5).integers(0, 300, 100).tolist()
#: What is written, and the model type that plain transformers has for it.
SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "bitnet": ({}, "bitnet"),
    "llama": ({"model_type": "llama"}, "llama"),
    "llama of this package": ({"model_type": "thrifty", "norm_placement": "pre", "head_dim": 24}, "llama"),
    "divides": ({"quantization_config": PACKED | {"linear_class": "bitlinear"}}, "bitnet"),
    "latent": ({"latent": True}, "bitnet"),
    "latent of transformers": ({"latent": True, "model_type": "bitnet", "online": True}, "bitnet"),
}


def source(path: Path, name: str) -> Path:
    fields = dict(SOURCES[name][0])
    if fields.pop("online", False):
        # The record that transformers writes: scales are not rounded in its forward pass.
        record = {**PACKED, "quantization_mode": "online"}
        del record["scale_dtype"]
        fields["quantization_config"] = record
    return write_checkpoint(path, **fields).path


def their_logits(folder: Path) -> np.ndarray:
    with torch.no_grad():
        return transformers_model(folder)(torch.tensor([TOKENS])).logits[0].float().numpy()


def assert_parity(got: np.ndarray, expected: np.ndarray) -> None:
    """The rule of the design, over positions of which a code may fall elsewhere in a few."""
    span = np.ptp(expected)
    assert np.median(np.abs(got - expected).max(-1)) < 1e-3 * span
    best = np.sort(expected, -1)
    sure = best[:, -1] - best[:, -2] > 1e-3 * span
    assert (got.argmax(-1) == expected.argmax(-1))[sure].all()


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("name", SOURCES)
def test_plain_transformers_computes_what_the_runtime_does(tmp_path, name, linear_class):
    path = source(tmp_path / "source", name)
    # In float32: asked for another dtype, its loader widens the codes alone and leaves the rest as it is stored.
    to_transformers(open_folder(path), tmp_path / "output", linear_class, dtype="float32")
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert config["model_type"] == SOURCES[name][1]
    expected = load(path).logits(TOKENS)
    np.testing.assert_array_equal(load(tmp_path / "output").logits(TOKENS), expected)
    assert_parity(their_logits(tmp_path / "output"), expected)


def test_latent_weights_are_quantised_as_transformers_does_it(tmp_path):
    path = source(tmp_path / "source", "latent of transformers")
    tensors = open_safetensors(path / "model.safetensors")
    save_safetensors(path / "model.safetensors", {name: Tensor.of(t.float32()) for name, t in tensors.items()})
    assert_parity(load(path).logits(TOKENS), their_logits(path))
    rounded = source(tmp_path / "rounded", "latent")
    assert not np.array_equal(load(path).logits(TOKENS), load(rounded).logits(TOKENS))


@pytest.mark.parametrize("name", ["bitnet", "divides"])
def test_the_way_there_and_back_changes_no_bit(tmp_path, name):
    path = source(tmp_path / "source", name)
    first, second = ("autobitlinear", "bitlinear") if name == "divides" else ("bitlinear", "autobitlinear")
    to_transformers(open_folder(path), tmp_path / "there", first)
    to_transformers(open_folder(tmp_path / "there"), tmp_path / "back", second)
    before, after = (open_safetensors(folder / "model.safetensors") for folder in (path, tmp_path / "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key].float32(), tensor.float32())
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()


def test_names_of_1bitllm_become_those_of_transformers(tmp_path):
    path = write_checkpoint(tmp_path / "source", latent=True, hidden_act="silu", rope_theta=10_000.0).path
    tensors = {
        name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm"): tensor
        for name, tensor in open_safetensors(path / "model.safetensors").items()
    }
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = Tensor.of(np.ones(6, np.float32))
    save_safetensors(path / "model.safetensors", tensors)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config | {"model_type": "llama", "weight_bits": 1, "input_bits": 8}))
    to_transformers(open_folder(path), tmp_path / "output", dtype="float32")
    assert_parity(their_logits(tmp_path / "output"), load(path).logits(TOKENS))


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("mixture", QUANTISED)
def test_every_mixture_of_this_package_stays_what_it_computes(tmp_path, mixture, linear_class):
    save_packed(small_model(mixture), tmp_path / "source")
    to_transformers(open_folder(tmp_path / "source"), tmp_path / "output", linear_class)
    tokens = TOKENS[:20] if max(TOKENS[:20]) < 90 else [token % 90 for token in TOKENS[:20]]
    expected = load(tmp_path / "source").logits(tokens)
    np.testing.assert_array_equal(load(tmp_path / "output").logits(tokens), expected)


def test_a_head_in_the_file_counts_though_the_config_ties_it(tmp_path):
    path = write_checkpoint(tmp_path / "source", tie_word_embeddings=False).path
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    assert not open_folder(path).config.tie_word_embeddings
    to_transformers(open_folder(path), tmp_path / "output", dtype="float32")
    assert_parity(their_logits(tmp_path / "output"), load(path).logits(TOKENS))
    tensors = open_safetensors(path / "model.safetensors")
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    save_safetensors(path / "model.safetensors", same)
    assert open_folder(path).config.tie_word_embeddings


def test_a_float16_that_would_be_infinite_is_refused(tmp_path):
    path = source(tmp_path / "source", "bitnet")
    tensors = open_safetensors(path / "model.safetensors")
    large = Tensor.of(np.full(48, 1e5, np.float32))
    save_safetensors(path / "model.safetensors", tensors | {"model.norm.weight": large})
    with pytest.raises(ThriftyError, match="float16 ends at 65504"):
        to_transformers(open_folder(path), tmp_path / "output", dtype="float16")
    to_transformers(open_folder(path), tmp_path / "output")
    assert json.loads((tmp_path / "output" / "config.json").read_text())["dtype"] == "float32"


def test_a_conversion_onto_its_source_is_refused(tmp_path):
    path = source(tmp_path / "source", "bitnet")
    for output in (path, tmp_path):
        with pytest.raises(ThriftyError, match="must not be the source or hold it"):
            to_transformers(path, output, overwrite=True)


@pytest.mark.parametrize("scale", [0.5, 0.0123, 3.1e-5, 1.7])
def test_a_reciprocal_leads_back(scale):
    for value in (np.float32(scale), Tensor.of(np.array([scale], np.float32), "BF16").float32()[0]):
        assert reciprocal(reciprocal(value)) == pytest.approx(value, rel=2e-7)
    assert reciprocal(np.float32(1) / value) == value


def test_what_transformers_would_compute_otherwise_is_refused(tmp_path):
    biased = write_checkpoint(tmp_path / "biased", attention_bias=True, norm_placement="pre").path
    with pytest.raises(ThriftyError, match=r"AutoBitLinear scales a bias.*q_proj.*convert to bitlinear"):
        to_transformers(open_folder(biased), tmp_path / "output")
    odd = write_checkpoint(tmp_path / "odd", intermediate_size=82).path
    with pytest.raises(ThriftyError, match=r"rows in fours; mlp\.gate_proj .* has 82"):
        to_transformers(open_folder(odd), tmp_path / "output")
    dense = write_checkpoint(tmp_path / "dense", linear="dense").path
    with pytest.raises(ThriftyError, match="are dense"):
        to_transformers(open_folder(dense), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_byte_that_is_no_code_leaves_nothing_behind(tmp_path):
    path = source(tmp_path / "source", "bitnet")
    tensors = {name: Tensor(t.dtype, t.data.copy()) for name, t in open_safetensors(path / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"].data[3, 5] |= 12
    save_safetensors(path / "model.safetensors", tensors)
    with pytest.raises(ThriftyError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .*has 3"):
        to_transformers(open_folder(path), tmp_path / "output")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
