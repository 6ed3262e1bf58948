"""Doge and Cheems against plain transformers, and the folders of other generations."""

import json
import warnings
from typing import Any

import pytest
import torch
import transformers
from models.suite import SMALL, small_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from thrifty.errors import ThriftyError
from thrifty.models import (
    CheemsForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    DogeForSequenceClassification,
    DogeModel,
    ThriftyForCausalLM,
)

pytestmark = pytest.mark.usefixtures("quiet")
DENSE = [{}, {"keep_window_size": 5}, {"keep_window_size": 1}, {"attention_bias": True, "mlp_bias": True}]
DENSE += [{"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True, "rope_theta": 77.0}]


def their_model(**fields: Any) -> Any:
    """transformers' Doge with random weights, none of them at its first value."""
    torch.manual_seed(0)
    config = {**SMALL, "num_key_value_heads": 2, "initializer_range": 0.3, "keep_window_size": 64, **fields}
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("norm", "bias", "residual", ".A")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def distinct_tokens(batch: int = 3, length: int = 20) -> torch.Tensor:
    """No token twice in a row: equal tokens have equal scores in the first layer, which upstream orders by chance."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack(
        [3 + torch.randperm(SMALL["vocab_size"] - 3, generator=generator)[:length] for _ in range(batch)]
    )


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.fixture(params=DENSE, ids=lambda fields: "-".join(fields) or "plain")
def pair(request, tmp_path) -> tuple[Any, Any]:
    theirs = their_model(**request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, DogeForCausalLM.from_pretrained(tmp_path)


def test_logits_are_those_of_transformers(pair):
    theirs, ours = pair
    tokens = distinct_tokens()
    close(logits(ours, tokens), logits(theirs, tokens))


def test_logits_are_those_of_transformers_step_by_step(pair):
    theirs, ours = pair
    tokens = distinct_tokens()
    expected = logits(theirs, tokens)
    cache, their_cache = DynamicCache(), DynamicCache()
    for t, columns in enumerate(tokens.split([7] + [1] * 13, 1)):
        at = 0 if t == 0 else 6 + t
        got = logits(ours, columns, past_key_values=cache)
        close(got, expected[:, at : at + columns.shape[1]])
        close(got, logits(theirs, columns, past_key_values=their_cache))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_transformers_under_padding(pair, side):
    theirs, ours = pair
    tokens = distinct_tokens()
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 4, 11)):
        columns = slice(0, padding) if side == "left" else slice(20 - padding, 20)
        tokens[row, columns], mask[row, columns] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits(theirs, tokens, attention_mask=mask, position_ids=positions)
    kept = mask.bool()
    close(logits(ours, tokens, attention_mask=mask)[kept], expected[kept])
    if side == "left":
        cache = DynamicCache()
        first = logits(ours, tokens[:, :15], attention_mask=mask[:, :15], past_key_values=cache)
        rest = [
            logits(ours, tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            for t in range(15, 20)
        ]
        close(torch.cat([first, *rest], 1)[kept], expected[kept])


def test_generates_what_transformers_generates(pair):
    theirs, ours = pair
    tokens = distinct_tokens(2, 6)
    options: Any = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **options)
    if theirs.config.keep_window_size > 14:  # else a token that comes again ties with itself
        assert torch.equal(ours.generate(tokens, **options), expected)


@pytest.mark.parametrize("mixture", ["doge", "doge-wide"])
def test_a_plain_folder_is_read_by_transformers(mixture, tmp_path):
    model = small_model(mixture)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is transformers.DogeForCausalLM
    close(logits(model, distinct_tokens()), logits(theirs, distinct_tokens()))
    again = ThriftyForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, distinct_tokens()), logits(model, distinct_tokens()))


def test_loads_through_every_class(tmp_path):
    model, tokens = small_model("doge"), distinct_tokens()
    model.save_pretrained(tmp_path)
    base = DogeModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model.lm_head(base(tokens).last_hidden_state), model(tokens).logits)
    small_model("doge-ternary").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "thrifty"
    assert DogeForCausalLM.from_pretrained(tmp_path).config.linear == "ternary"


def test_classifies_as_transformers_does(tmp_path):
    torch.manual_seed(0)
    config = transformers.DogeConfig(**{**SMALL, "num_labels": 5, "initializer_range": 0.3})
    theirs = transformers.DogeForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = DogeForSequenceClassification.from_pretrained(tmp_path)
    tokens = distinct_tokens()
    tokens[1, 12:] = 0
    mask, labels = (tokens != 0).long(), torch.tensor([4, 0, 2])
    with torch.no_grad():
        a, b = (model(tokens, attention_mask=mask, labels=labels) for model in (ours, theirs))
    close(a.logits, b.logits)
    close(a.loss, b.loss)
    ours.save_pretrained(tmp_path / "again")
    assert type(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")) is type(theirs)


def test_a_language_model_becomes_a_classifier(tmp_path):
    small_model("doge").save_pretrained(tmp_path)
    model = DogeForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    tokens = distinct_tokens()
    model.train()(tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert logits(model.eval(), tokens).shape == (3, 3)


MOE = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 7, "router_aux_loss_coef": 0.5}


@pytest.mark.filterwarnings("ignore:router_layout='legacy':UserWarning")
@pytest.mark.parametrize("fields", [{}, {"keep_window_size": 5}, {"norm_topk_prob": True, "mlp_bias": True}])
def test_logits_of_experts_are_those_of_transformers(tmp_path, fields):
    theirs = their_model(**MOE, **fields)
    theirs.save_pretrained(tmp_path)
    ours = DogeForCausalLM.from_pretrained(tmp_path, router_layout="legacy")
    tokens, cache, their_cache = distinct_tokens(), DynamicCache(), DynamicCache()
    close(logits(ours, tokens), logits(theirs, tokens))
    for columns in tokens.split([7] + [1] * 13, 1):
        got = logits(ours, columns, past_key_values=cache)
        close(got, logits(theirs, columns, past_key_values=their_cache))
    # Upstream's router reads what stands at padding too, so its positions must be the same.
    for columns in (slice(16, 20), slice(0, 4)):
        padded, mask = tokens.clone(), torch.ones_like(tokens)
        padded[1, columns], mask[1, columns] = 0, 0
        given: Any = {"attention_mask": mask, "labels": tokens, "output_router_logits": True}
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            a, b = ours(padded, **given), theirs(padded, **given)
        close(a.aux_loss, b.aux_loss)
        close(a.loss, b.loss)
        close(a.logits[mask.bool()], b.logits[mask.bool()])
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "doge"
    again = DogeForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), logits(ours, tokens))
    close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), tokens), logits(ours, tokens))


def test_a_folder_of_experts_routes_each_token_itself_unless_told_otherwise(tmp_path):
    their_model(**MOE).save_pretrained(tmp_path)
    model = DogeForCausalLM.from_pretrained(tmp_path)
    assert model.config.router_layout == "per_token"
    tokens = distinct_tokens()
    close(logits(model, tokens)[:, :10], logits(model, tokens[:, :10]))
    model.save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model_type"] == "thrifty"


def seed_folder(model: Any, folder: Any, names: dict[str, str], **fields: Any) -> None:
    """The model's tensors under the seed's names, with a config.json such as the seed wrote."""
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for new, old in names.items():
            name = name.replace(new, old)
        tensors[name] = (-tensor.exp() if name.endswith("ssd.A") else tensor).clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours = json.loads((folder / "config.json").read_text())
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    config = {name: ours[name] for name in (*kept, "max_position_embeddings", "num_key_value_heads")}
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}
    config |= {"hidden_bias": False, "rope_theta": 10_000.0, "rope_scaling": scaling, "is_moe": False, **fields}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("mixture", ["doge-seed", "doge-moe-seed"])
def test_the_seeds_doge_loads(tmp_path, mixture):
    model = small_model(mixture)
    names = {
        "embed_tokens": "word_embed",
        "post_attention_layernorm": "post_layernorm",
        "input_layernorm": "pre_layernorm",
        "post_attention_residual": "post_residual.weight",
        "input_residual": "pre_residual.weight",
        "mlp.": "feed_forward.",
        "model.norm.": "model.final_layernorm.",
    }
    fields: dict[str, Any] = {"model_type": "doge", "dynamic_mask_ratio": 0.0, "is_causal": False}
    if mixture == "doge-moe-seed":
        fields |= {"is_moe": True, "num_cdmoe_experts": 49, "num_cdmoe_heads": 2, "num_cdmoe_experts_per_head": 5}
        fields |= {"expert_retrieval_size": 6}
    seed_folder(model, tmp_path, names, **fields)
    loaded = DogeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, distinct_tokens()), logits(model, distinct_tokens()))
    loaded.save_pretrained(tmp_path / "new")
    assert "model.layers.0.input_residual" in load_file(tmp_path / "new" / "model.safetensors")


@pytest.mark.parametrize("grows", [False, True])
def test_the_seeds_cheems_loads(tmp_path, grows):
    model = small_model("cheems-seed")
    names = {
        "embed_tokens": "word_embed",
        "post_attention_layernorm": "pre_state_layernorm",
        "input_layernorm": "pre_sequence_layernorm",
        "post_attention_residual": "post_state_residual.weight",
        "input_residual": "post_sequence_residual.weight",
        "mlp.": "feed_forward.",
        "model.norm.": "model.final_layernorm.",
        "layers.0.self_attn.A_log": "layers.0.ssd.A",
        "layers.0.self_attn.o_proj": "layers.0.ssd.out_proj",
        "layers.0.self_attn": "layers.0.ssd",
        "layers.1.self_attn": "layers.1.attn",
    }
    fields = {"attn_layer_period": 2, "attn_layer_offset": 1, "ssd_chunk_size": 4, "dynamic_mask_ratio": 0.0}
    seed_folder(model, tmp_path, names, model_type="cheems", **fields)
    if grows:  # as the seed draws it: A = 1
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.layers.0.ssd.A"].neg_()
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = CheemsForCausalLM.from_pretrained(tmp_path)
    close(logits(loaded, distinct_tokens()), logits(model, distinct_tokens()))
    loaded.save_pretrained(tmp_path / "new")
    assert "model.layers.0.self_attn.A_log" in load_file(tmp_path / "new" / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "option"),
    [({"qk_norm": False}, "qk_norm=False"), ({"dt_heads": "attention"}, "dt_heads='attention'")],
)
def test_another_generation_is_named_with_the_way_out(tmp_path, fields, option):
    torch.manual_seed(0)
    model = DogeForCausalLM(DogeConfig(**SMALL, num_key_value_heads=2, **fields)).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("qk_norm", "dt_heads"):
        config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "doge"}))
    with pytest.raises(ThriftyError, match=f"another generation give {option}"):
        DogeForCausalLM.from_pretrained(tmp_path)
    loaded = DogeForCausalLM.from_pretrained(tmp_path, **fields)
    assert torch.equal(logits(loaded, distinct_tokens()), logits(model, distinct_tokens()))


def test_the_seeds_threshold_sees_the_future_and_says_so():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = DogeForCausalLM(
            DogeConfig(**SMALL, dynamic_mask_selection="ratio_legacy", dynamic_mask_ratio=0.5, initializer_range=0.3)
        ).eval()
    assert any("future" in str(warning.message) for warning in caught)
    assert logits(model, distinct_tokens()).isfinite().all()


def test_padded_generation_with_router_logits_counts_the_new_tokens():
    torch.manual_seed(0)
    model: Any = DogeForCausalLM(
        DogeConfig(**SMALL, feed_forward="cdmoe", num_experts=16, num_experts_per_tok=4, output_router_logits=True)
    ).eval()
    tokens = torch.arange(1, 13).view(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    options: dict = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(tokens, attention_mask=mask, output_router_logits=False, **options)
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options), expected)
