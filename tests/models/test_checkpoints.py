"""What goes wrong while loading and saving."""

import json
import sys
from typing import Any

import pytest
import torch
from models.suite import small_model, small_tokens
from safetensors.torch import load_file, save_file

from thrifty.errors import ThriftyError
from thrifty.models import ThriftyForCausalLM, save_packed

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def folder(tmp_path):
    save_packed(small_model("bitnet"), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale"))
    with pytest.raises(ThriftyError, match=r"model.layers.1.mlp.up_proj.weight_scale is missing"):
        ThriftyForCausalLM.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].clone()

    rewrite(folder, change)
    with pytest.raises(ThriftyError, match=r"up_proj.weight must have shape \(12, 32\); got \(11, 32\)"):
        ThriftyForCausalLM.from_pretrained(folder)


def test_a_byte_that_is_no_code_is_refused(folder):
    rewrite(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(255))
    with pytest.raises(ThriftyError):
        ThriftyForCausalLM.from_pretrained(folder)


def test_a_truncated_file_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ThriftyError, match="must hold safetensors"):
        ThriftyForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'bitnet'; got 'gptq'"),
        ({"quant_method": "bitnet", "linear_class": "other"}, "linear_class must be 'bitlinear' or 'autobitlinear'"),
    ],
)
def test_other_records_of_quantisation_are_refused(folder, record, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": record}))
    with pytest.raises(ThriftyError, match=message):
        ThriftyForCausalLM.from_pretrained(folder)


def test_a_failed_save_leaves_the_old_files(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(ThriftyError, match=r"model could not be written: no space .*unchanged"):
        small_model("bitnet", seed=1).save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_saving_keeps_other_files_of_the_folder(folder):
    (folder / "tokenizer.json").write_text("{}")
    save_packed(small_model("bitnet", seed=1), folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_who_may_read_a_config_may_read_the_tensors(folder):
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ThriftyError, match="must be a folder"):
        small_model("bitnet").save_pretrained(tmp_path / "file")


def test_shards_load(tmp_path):
    model, tokens = small_model("bitnet"), small_tokens()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(ThriftyForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    other = small_model("bitnet", seed=1)
    for size in ("1GB", "10KB"):  # neither the old shards nor the old single file may be taken for the new tensors
        other.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(ThriftyForCausalLM.from_pretrained(tmp_path)(tokens).logits, other(tokens).logits)
        assert (tmp_path / "model.safetensors").exists() == (size == "1GB")


def test_config_fields_and_dtype_can_be_given(folder):
    model = ThriftyForCausalLM.from_pretrained(folder, rms_norm_eps=1e-3, dtype=torch.bfloat16)
    assert model.config.rms_norm_eps == 1e-3
    assert model.dtype == torch.bfloat16
    loaded: Any = ThriftyForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert model.dtype == torch.float32
    assert not info["unexpected_keys"]
