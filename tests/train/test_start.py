import json
import shutil
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from thrifty.errors import ThriftyError
from thrifty.models import ThriftyForCausalLM, save_packed
from thrifty.nn import BitLinear
from thrifty.train import trainer as module
from thrifty.train.corpus import Corpus, Part
from thrifty.train.initial import new_model
from thrifty.train.recipe import Shape, find_recipe
from thrifty.train.start import fit_sub_norms, load_start, low_bit_model, open_given
from thrifty.train.tokenizer import save_tokenizer, train_tokenizer
from thrifty.train.warmup import set_quantization

TEXT = "".join(f"The {n}th line of a text that counts its lines.\n" for n in range(200))
CORPUS = Corpus("lines", (Part("text", (TEXT,)),), "The last line of a text.\n" * 20)
TOKENIZER = train_tokenizer([TEXT], 280)
SHAPE: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "keep_window_size": 8,
}
RUN: dict[str, Any] = {
    "steps": 6,
    "batch_size": 2,
    "sequence_length": 16,
    "warmup": 1,
    "eval_every": 4,
    "save_every": 4,
    "compile": False,
    "quantization_warmup": 0.7,
}
CONTINUE, DISTILL = (find_recipe(name).override(**RUN) for name in ("continue", "distill"))
TOKENS = torch.randint(280, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense models by their families, and beside them Llama's of transformers, each with the tokenizer."""
    made = {}
    for family in ("bitnet", "doge", "cheems", "matmulfree"):
        torch.manual_seed(0)
        made[family] = tmp_path_factory.mktemp(family)
        new_model(Shape(**SHAPE, model=family, linear="dense"), TOKENIZER).save_pretrained(made[family])
    made["llama"] = tmp_path_factory.mktemp("llama")
    fields = {name: value for name, value in SHAPE.items() if name != "keep_window_size"}
    LlamaForCausalLM(LlamaConfig(**fields, bos_token_id=1, eos_token_id=2)).save_pretrained(made["llama"])
    for folder in made.values():
        save_tokenizer(TOKENIZER, folder, 32)
    return made


def train(output, recipe=CONTINUE, **options):
    return module.train(CORPUS, recipe, output, console=Console(quiet=True), **options)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(folder, insert_sub_norms: bool = False):
    given = open_given(folder, None, CONTINUE.training)
    assert given.start is not None
    original = load_start(given.start, given.begin_token())
    return original, low_bit_model(original, insert_sub_norms)


@pytest.mark.parametrize("family", ["bitnet", "doge", "cheems", "matmulfree", "llama"])
def test_a_dense_model_is_the_low_bit_one_before_the_warm_up(folders, family):
    original, model = start(folders[family])
    assert any(isinstance(layer, BitLinear) for layer in model.modules())
    with torch.no_grad():
        expected, quantised = original.eval()(TOKENS).logits, model.eval()(TOKENS).logits
        set_quantization(model, 0.0)
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(quantised, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["bitnet", "doge", "cheems", "matmulfree"])
def test_inserted_norms_are_fitted_to_the_model(folders, family):
    original, model = start(folders[family], insert_sub_norms=True)
    sample = torch.randint(280, (4, 16))
    with torch.no_grad():
        expected = original.eval()(TOKENS).logits
        set_quantization(model.eval(), 0.0)
        before = (model(TOKENS).logits - expected).norm()
        fit_sub_norms(model, original, sample)
        after = (model(TOKENS).logits - expected).norm()
    assert after < 0.5 * before
    assert not any(layer._forward_pre_hooks for layer in original.modules())


@pytest.mark.parametrize("family", ["bitnet", "doge", "cheems", "matmulfree"])
@pytest.mark.parametrize("recipe", [CONTINUE, DISTILL], ids=["continue", "distill"])
def test_every_family_goes_from_dense_to_ternary(folders, family, recipe, tmp_path):
    teacher = folders[family] if recipe is DISTILL else None
    result = train(tmp_path, recipe, start=folders[family], teacher=teacher)
    logged = [entry for entry in result.history if "loss" in entry]
    assert [entry["lambda"] for entry in logged] == pytest.approx([0, 1 / 4.2, 2 / 4.2, 3 / 4.2, 4 / 4.2, 1])
    assert all(("teacher_loss" in entry) == ("relation_loss" in entry) == (recipe is DISTILL) for entry in logged)
    assert all(layer.quantization is None for layer in result.model.modules() if isinstance(layer, BitLinear))
    saved = ThriftyForCausalLM.from_pretrained(tmp_path).eval()
    assert saved.config.linear == "ternary"
    with torch.no_grad():
        assert torch.equal(saved(TOKENS).logits, result.model.eval()(TOKENS).logits)
    assert (tmp_path / "tokenizer_config.json").exists()


def test_a_run_that_is_cut_in_its_warm_up_ends_with_the_same_weights(folders, tmp_path):
    models = {"start": folders["llama"], "teacher": folders["llama"]}
    whole = train(tmp_path / "whole", DISTILL, **models)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-6")
    resumed = train(tmp_path / "cut", DISTILL, resume=True, **models)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert [entry.get("lambda") for entry in resumed.history] == [entry.get("lambda") for entry in whole.history]


def test_latent_and_packed_models_go_on(folders, tmp_path):
    _, model = start(folders["bitnet"])
    model.save_pretrained(tmp_path / "latent")
    save_packed(model, tmp_path / "packed", torch.float32)
    for kind in ("latent", "packed"):
        save_tokenizer(TOKENIZER, tmp_path / kind, 32)
        result = train(
            tmp_path / "out", CONTINUE.override(steps=1, quantization_warmup=0.0), start=tmp_path / kind, resume=False
        )
        assert result.record["bits_per_byte"] > 0


def test_a_new_model_takes_the_tokenizer_of_its_teacher(folders, tmp_path):
    recipe = find_recipe("tiny").override(**SHAPE | RUN | {"distill_weight": 1.0, "steps": 1})
    result = train(tmp_path, recipe, teacher=folders["llama"])
    assert result.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert result.model.config.bos_token_id == 1


def test_what_does_not_fit_is_one_sentence_before_the_folder_is_touched(folders, tmp_path):
    def refused(match: str, recipe=CONTINUE, **models: Any) -> None:
        with pytest.raises(ThriftyError, match=match):
            train(tmp_path / "out", recipe, **models)
        assert not (tmp_path / "out").exists()

    llama = folders["llama"]
    both = {"start": llama, "teacher": llama}
    long = CONTINUE.override(sequence_length=64)
    refused("a recipe must have a shape for a new model; continue has none; give a model to go on from by --from")
    refused("sequence_length must be at most the 32 positions of .*; got 64", long, start=llama)
    refused("a teacher goes with a distill_weight .*; got such a weight and no teacher; give", DISTILL, start=llama)
    refused("a teacher goes with .*; got a teacher and none of them; --recipe distill has them", **both)
    refused("relation_layer must count layers .*, -1 to -2; got -3", DISTILL.override(relation_layer=-3), **both)
    other = shutil.copytree(llama, tmp_path / "other")
    save_tokenizer(train_tokenizer(["other words"], 270), other, 32)
    refused("one vocabulary; got 2.. pieces in .*other and 280 in the", DISTILL, start=llama, teacher=other)
    save_tokenizer(train_tokenizer([TEXT], 300), other, 32)
    refused("ids must be below the model's 280 pieces; .*other has ids up to 299", start=other)
    (other / "tokenizer.json").write_text("{")
    refused(r"tokenizer.json must be a tokenizer", start=other)
    (other / "tokenizer.json").unlink()
    refused("must be a tokenizer.json; .*other has none", start=other)
    save_tokenizer(TOKENIZER, other, 32)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"bos_token_id": None, "eos_token_id": None}))
    refused("must have a token for the beginning or the end of a text; config.json of .*other has none", start=other)


def test_mixed_latent_and_packed_weights_are_refused(folders, tmp_path):
    _, model = start(folders["bitnet"])
    save_packed(model, tmp_path / "mixed", torch.float32)
    save_tokenizer(TOKENIZER, tmp_path / "mixed", 32)
    tensors = weights(tmp_path / "mixed")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.randn(32, 16)
    save_file(tensors, tmp_path / "mixed/model.safetensors", {"format": "pt"})
    with pytest.raises(ThriftyError, match=f"tensor '{name}' must be packed .U8. and is F32"):
        train(tmp_path / "out", start=tmp_path / "mixed")
