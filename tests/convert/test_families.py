"""Folders of every family and convention that transformers writes, converted."""

import numpy as np
import pytest
import torch
import transformers
from transformers_folders import CONVENTIONS, FAMILIES, TOKENS, check_parity, write_folder

from thrifty import ThriftyError
from thrifty.checkpoint import open_folder, open_model
from thrifty.convert import to_gguf, to_transformers
from thrifty.runtime import load

pytestmark = pytest.mark.usefixtures("eager_bitnet")


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_from_the_other_convention(family, convention, tmp_path):
    (tmp_path / "source").mkdir()
    write_folder(tmp_path / "source", family, convention)
    source = open_folder(tmp_path / "source")
    other = "bitlinear" if convention == "multiplies" or source.config.attention_bias else "autobitlinear"
    to_transformers(source, tmp_path / "output", other)
    logits = load(tmp_path / "source").logits(TOKENS)
    np.testing.assert_array_equal(load(tmp_path / "output").logits(TOKENS), logits)
    check_parity(tmp_path / "output")
    if source.config.attention_bias:
        with pytest.raises(ThriftyError, match="AutoBitLinear scales a bias"):
            to_transformers(source, tmp_path / "refused", "autobitlinear")


@pytest.mark.parametrize("convention", ["divides", "multiplies", "latent"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_gguf_there_and_back_computes_the_same(family, convention, tmp_path):
    (tmp_path / "source").mkdir()
    sizes = {"intermediate_size": 512} | ({"head_dim": 64} if family == "qwen3" else {})
    write_folder(tmp_path / "source", family, convention, torch.bfloat16, **sizes)
    to_gguf(open_folder(tmp_path / "source"), tmp_path / "model.gguf", head_type="BF16")
    to_transformers(open_model(tmp_path / "model.gguf"), tmp_path / "back", "bitlinear")
    logits = load(tmp_path / "source").logits(TOKENS)
    for path in ("model.gguf", "back"):
        np.testing.assert_array_equal(load(tmp_path / path).logits(TOKENS), logits)
    # Loaded as it is, whatever the dtypes of the tensors of a GGUF file are.
    linear_class = "bitlinear" if family in ("llama-bias", "qwen2") else "autobitlinear"
    to_transformers(open_model(tmp_path / "model.gguf"), tmp_path / "plain", linear_class)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    assert np.corrcoef(theirs.ravel(), logits.ravel())[0, 1] > 0.99
    if convention == "divides":
        before, after = open_folder(tmp_path / "source").tensors, open_folder(tmp_path / "back").tensors
        for name in before:
            np.testing.assert_array_equal(after[name].float32(), before[name].float32(), err_msg=name)


@pytest.mark.parametrize(
    ("family", "convention", "reason"),
    [("llama", "normed-divides", "norms of their own"), ("llama3-rope", "divides", "are scaled")],
)
def test_gguf_is_refused_where_llama_cpp_computes_otherwise(family, convention, reason, tmp_path):
    write_folder(tmp_path, family, convention, intermediate_size=512)
    with pytest.raises(ThriftyError, match=reason):
        to_gguf(open_folder(tmp_path), tmp_path / "model.gguf")
