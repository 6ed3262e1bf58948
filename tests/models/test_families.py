"""What a folder is called, and who reads it."""

import json

import pytest
import torch
from models.suite import MIXTURES, small_model, small_tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from thrifty.models import MatMulFreeConfig, MatMulFreeForCausalLM, ThriftyForCausalLM, save_packed
from thrifty.nn import MLGRU, is_packed

pytestmark = pytest.mark.usefixtures("quiet")
#: Mixtures by what they are saved as; all others are "thrifty".
PLAIN = {"bitnet": ["bitnet", "bitnet-untied-relu2"], "doge": ["doge", "doge-wide"]}
OWN = {"matmulfree": ["matmulfree"], "cheems": ["cheems", "cheems-seed", "cheems-moe"]}
NAMES = {"thrifty": "Thrifty", "bitnet": "BitNet", "doge": "Doge", "cheems": "Cheems", "matmulfree": "MatMulFree"}


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_folder_has_transformers_type_only_where_transformers_computes_the_same(mixture, tmp_path):
    small_model(mixture).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    kind = next((kind for kind, names in (PLAIN | OWN).items() if mixture in names), "thrifty")
    assert config["model_type"] == kind
    assert config["architectures"] == [f"{NAMES[kind]}ForCausalLM"]
    assert ("linear" in config) == (kind not in PLAIN)


@pytest.mark.parametrize("mixture", [name for names in OWN.values() for name in names])
def test_own_families_are_known_to_the_auto_classes(mixture, tmp_path):
    model, tokens = small_model(mixture), small_tokens()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert isinstance(AutoModel.from_pretrained(tmp_path), type(model.model))
    assert torch.equal(logits(ThriftyForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_the_matmul_free_model_has_no_end():
    """Nothing in it reads positions, so a text may be longer than those it was made for."""
    model = small_model("matmulfree")
    assert all(isinstance(layer.self_attn, MLGRU) for layer in model.model.layers)
    assert logits(model, small_tokens(1, 100)).isfinite().all()
    assert MatMulFreeConfig().linear == "ternary"


def test_a_packed_matmul_free_folder_is_read_by_either_class(tmp_path):
    model, tokens = small_model("matmulfree"), small_tokens()
    save_packed(model, tmp_path, torch.float32)
    for kind in (MatMulFreeForCausalLM, ThriftyForCausalLM, AutoModelForCausalLM):
        packed = kind.from_pretrained(tmp_path)
        assert is_packed(packed)
        assert torch.equal(logits(packed, tokens), logits(model, tokens))
