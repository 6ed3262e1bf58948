"""Llama and Qwen folders of transformers in the decoder: read, trained, packed, saved, and read there again."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers_folders import transformers_model, write_folder

from thrifty import ThriftyError
from thrifty.models import ThriftyForCausalLM, save_packed
from thrifty.nn import BitLinear, is_packed
from thrifty.runtime import load

pytestmark = pytest.mark.usefixtures("quiet", "eager_bitnet")
TOKENS = torch.randint(0, 300, (1, 100), generator=torch.Generator().manual_seed(0))
PLAIN = {"llama": "llama", "llama-bias": "llama", "llama3-rope": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits[0].float().numpy()


def model_type(folder) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def close(actual: np.ndarray, expected: np.ndarray, share: float) -> None:
    assert np.abs(actual - expected).max() < share * np.ptp(expected)


@pytest.mark.parametrize("family", PLAIN)
def test_a_dense_folder_goes_in_and_out(family, tmp_path):
    write_folder(tmp_path, family, None)
    expected = logits(transformers_model(tmp_path))
    model = ThriftyForCausalLM.from_pretrained(tmp_path)
    close(logits(model), expected, 1e-5)
    model.save_pretrained(tmp_path / "again")
    assert model_type(tmp_path / "again") == PLAIN[family]
    close(logits(transformers_model(tmp_path / "again")), expected, 1e-6)
    close(load(tmp_path / "again").logits(TOKENS[0].tolist()), expected, 1e-5)


@pytest.mark.parametrize(
    ("family", "convention"),
    [
        *((family, "divides") for family in PLAIN),
        *(("bitnet", "divides"), ("qwen2", "multiplies"), ("qwen3", "multiplies")),
        *(("llama", "normed-divides"), ("bitnet", "normed-divides")),
    ],
)
def test_a_packed_folder_stays_packed(family, convention, tmp_path):
    write_folder(tmp_path, family, convention)
    model = ThriftyForCausalLM.from_pretrained(tmp_path)
    assert is_packed(model)
    expected = logits(model)
    close(load(tmp_path).logits(TOKENS[0].tolist()), expected, 1e-6)
    model.save_pretrained(tmp_path / "again")
    # A bias beside packed weights, transformers would scale.
    plain = family not in ("llama-bias", "qwen2")
    assert model_type(tmp_path / "again") == (PLAIN.get(family, family) if plain else "thrifty")
    np.testing.assert_array_equal(logits(ThriftyForCausalLM.from_pretrained(tmp_path / "again")), expected)
    close(load(tmp_path / "again").logits(TOKENS[0].tolist()), expected, 1e-6)
    if plain:
        close(logits(transformers_model(tmp_path / "again")), expected, 1e-3)


@pytest.mark.parametrize(
    ("family", "convention"), [("llama3-rope", "latent"), ("qwen2", "normed-latent"), ("qwen3", None)]
)
def test_a_folder_is_trained_and_packed(family, convention, tmp_path):
    write_folder(tmp_path, family, convention)
    model = ThriftyForCausalLM.from_pretrained(tmp_path, linear="ternary")
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), BitLinear)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        loss: Any = model(TOKENS[:, :30], labels=TOKENS[:, :30]).loss
        losses.append(loss.item())
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    expected = logits(model.eval())
    save_packed(model, tmp_path / "packed", torch.float32)
    close(load(tmp_path / "packed").logits(TOKENS[0].tolist()), expected, 1e-6)
    model.save_pretrained(tmp_path / "latent")
    close(load(tmp_path / "latent").logits(TOKENS[0].tolist()), expected, 1e-6)


def test_scaling_written_as_before_version_5_is_read(tmp_path):
    write_folder(tmp_path, "llama3-rope", "divides")
    expected = logits(ThriftyForCausalLM.from_pretrained(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(logits(ThriftyForCausalLM.from_pretrained(tmp_path)), expected)
    close(load(tmp_path).logits(TOKENS[0].tolist()), expected, 1e-6)


def test_a_scale_of_zero_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    write_folder(tmp_path, "llama", "divides")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"].zero_()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ThriftyError, match="scale"):
        ThriftyForCausalLM.from_pretrained(tmp_path)
