"""The suite that every mixture passes."""

import shutil

import pytest
import torch
from models.suite import MIXTURES, QUANTISED, SMALL, close_in_most, small_model, small_tokens
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from thrifty.errors import ThriftyError
from thrifty.models import ThriftyConfig, ThriftyForCausalLM, ThriftyModel, round_dense_parameters, save_packed
from thrifty.models.decoder import _compiled_layer
from thrifty.nn import is_packed, pack, unpack

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(params=MIXTURES)
def model(request) -> ThriftyForCausalLM:
    return small_model(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return small_tokens()


def logits(model, tokens, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


def test_causality_is_exact(model, tokens):
    before = logits(model, tokens)
    for t in (1, 7, 11):
        changed = tokens.clone()
        changed[:, t] = 3 + (changed[:, t] - 2) % 90
        after = logits(model, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_prefill_equals_steps(model, tokens):
    whole = logits(model, tokens)
    cache = DynamicCache()
    steps = [logits(model, tokens[:, t : t + 1], past_key_values=cache) for t in range(12)]
    close_in_most(torch.cat(steps, 1), whole)


def test_prefill_equals_chunks(model, tokens):
    cache = DynamicCache()
    chunks = [logits(model, chunk, past_key_values=cache) for chunk in tokens.split([5, 1, 4, 2], 1)]
    close_in_most(torch.cat(chunks, 1), logits(model, tokens))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_answer(model, tokens, side):
    padding = torch.zeros(2, 5, dtype=torch.long)
    parts = [padding, tokens] if side == "left" else [tokens, padding]
    padded = torch.cat(parts, 1)
    alone = logits(model, tokens)
    got = logits(model, padded, attention_mask=(padded != 0).long())
    assert got.isfinite().all()
    close_in_most(got[:, 5:] if side == "left" else got[:, :12], alone)


def test_a_row_does_not_depend_on_its_batch(model, tokens):
    close_in_most(logits(model, tokens)[:1], logits(model, tokens[:1]))


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_needs_no_cache(model, tokens, padded):
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    if padded:
        tokens = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
        options["attention_mask"] = (tokens != 0).long()
    cached = model.generate(tokens, **options)
    assert cached.shape == (2, tokens.shape[1] + 10)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))


def test_sampling_and_beams_run(model, tokens):
    torch.manual_seed(0)
    assert model.generate(tokens, max_new_tokens=4, do_sample=True, top_k=5, eos_token_id=None).shape == (2, 16)
    assert model.generate(tokens, max_new_tokens=4, do_sample=False, num_beams=3, eos_token_id=None).shape == (2, 16)


def test_assistants_and_static_caches_serve_attention_and_are_refused_elsewhere(model, tokens):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    ways = ({"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}, {"assistant_model": model})
    rows = tokens[:1]
    expected = model.generate(rows, **options)
    for way in ways:
        if model.config.is_stateful:
            with pytest.raises(
                ThriftyError, match=r"cannot be had: the caches of .* do not give tokens back; generate without"
            ):
                model.generate(rows, **options, **way)
        elif "dense" in str(model.config.linear):
            assert torch.equal(model.generate(rows, **options, **way), expected)
        else:  # a code can fall on the other side
            assert model.generate(rows, **options, **way).shape == expected.shape


def test_a_static_cache_is_refused_by_name():
    model = small_model("all-four")
    with pytest.raises(ThriftyError, match="static caches cannot be had: the caches of dynamic_mask, mlgru"):
        model(small_tokens(), past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ThriftyError, match=r"read a mask of padding \[B, S\]; got 4 dimensions"):
        model(small_tokens(), attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))


def test_the_vocabulary_can_grow(model, tokens):
    before = logits(model, tokens)
    model.resize_token_embeddings(120)
    after = logits(model, tokens)
    assert after.shape[-1] == 120
    torch.testing.assert_close(after[..., :97], before)


def test_checkpointing_changes_no_gradient(model, tokens):
    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model.train()
    plain = gradients()
    model.activation_checkpointing_enable()
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(g.isfinite().all() and g.any() for g in plain.values())


def test_loss_is_the_cross_entropy_of_the_next_token(model, tokens):
    labels = tokens.clone()
    labels[0, :4] = -100
    output = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_saved_and_loaded_is_the_same(model, tokens, tmp_path):
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert not loaded.training
    assert torch.equal(logits(loaded, tokens), expected)
    loaded.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("mixture", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_saved_and_loaded_is_the_same(mixture, dtype, tokens, tmp_path):
    model = small_model(mixture)
    if dtype == torch.bfloat16:
        round_dense_parameters(model)
    expected = logits(model, tokens)
    assert torch.equal(logits(pack(model), tokens), expected)
    save_packed(model, tmp_path / "a", dtype)
    assert not is_packed(model)
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert is_packed(loaded)
    assert torch.equal(logits(loaded, tokens), expected)
    save_packed(loaded, tmp_path / "b", dtype)
    trainable = type(model).from_pretrained(tmp_path / "a", unpack=True)
    assert torch.equal(logits(trainable, tokens), expected)
    save_packed(trainable, tmp_path / "c", dtype)
    for name in ("model.safetensors", "config.json"):
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes()
        assert first == (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("mixture", QUANTISED)
def test_unpacked_trains(mixture, tokens):
    model = unpack(pack(small_model(mixture))).train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / (parameter.grad.norm() + 1e-6)
    assert model(tokens, labels=tokens).loss < loss


def test_auto_classes_know_thrifty(tokens, tmp_path):
    model = small_model("ternary-mlp-pre")
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ThriftyConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ThriftyForCausalLM
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert type(AutoModel.from_pretrained(tmp_path)) is ThriftyModel
    save_packed(model, tmp_path / "packed")
    assert is_packed(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))


def test_hidden_states_embeddings_and_positions(tokens):
    model = small_model("bitnet")
    expected = logits(model, tokens)
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
        assert torch.equal(model(tokens, return_dict=False)[0], expected)
        assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert len(output.hidden_states) == 3
    assert torch.equal(logits(model, None, inputs_embeds=model.model.embed_tokens(tokens)), expected)
    assert torch.equal(logits(model, tokens, position_ids=torch.arange(12)[None].expand(2, 12)), expected)
    assert torch.equal(logits(model, tokens, logits_to_keep=1), expected[:, -1:])


def test_tied_weights_are_one_tensor(tmp_path):
    model = small_model("bitnet")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    packed = pack(model)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    save_packed(model, tmp_path)
    loaded = ThriftyForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_low_precision_keeps_logits_in_float32(tokens):
    model = small_model("bitnet").bfloat16()
    assert logits(model, tokens).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(small_model("bitnet"), tokens).dtype == torch.float32


# torch warns of what its own compiler does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("mixture", "kinds"), [("bitnet", 1), ("cheems", 2), ("matmulfree", 1)])
def test_layers_compile_once_for_all_of_a_kind_in_one_piece(mixture, kinds, tokens):
    torch._dynamo.reset()
    counters.clear()
    model = small_model(mixture).train()

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.compile_layers()
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]
    assert torch.equal(logits(model.eval(), tokens), logits(small_model(mixture), tokens))
    assert not torch._dynamo.config.suppress_errors


@pytest.mark.filterwarnings("ignore")
def test_layers_that_do_not_compile_train_as_they_are(tokens, monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler today")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=fails, **kw))
    torch._dynamo.reset()
    _compiled_layer.cache_clear()
    model = small_model("bitnet").train()
    expected = model(tokens, labels=tokens).loss
    model.compile_layers()
    assert torch.equal(model(tokens, labels=tokens).loss, expected)
    _compiled_layer.cache_clear()
    torch._dynamo.reset()


def test_too_long_a_text_is_refused():
    model = small_model("bitnet")
    with pytest.raises(ThriftyError, match="must fit max_position_embeddings = 64; got 65 tokens"):
        model(small_tokens(1, 65))
    with pytest.raises(ThriftyError, match="either input_ids or inputs_embeds"):
        model()


def test_round_dense_parameters_leaves_latent_weights():
    model = small_model("bitnet")
    up_proj = model.get_submodule("model.layers.0.mlp.up_proj")
    latent = up_proj.weight.clone()  # pyright: ignore
    assert round_dense_parameters(model) is model
    assert torch.equal(up_proj.weight, latent)  # pyright: ignore
    for name, parameter in model.named_parameters():
        if "_proj" not in name:
            assert torch.equal(parameter, parameter.bfloat16().float())


def test_the_config_says_what_is_in_the_folder(tmp_path):
    import json

    model = small_model("bitnet")
    model.save_pretrained(tmp_path)
    read = lambda: json.loads((tmp_path / "config.json").read_text())  # noqa: E731
    assert read()["quantization_config"]["quantization_mode"] == "online"
    save_packed(model, tmp_path)
    assert read()["quantization_config"]["quantization_mode"] == "offline"
    assert not hasattr(model.config, "quantization_config")
    small_model("dense").save_pretrained(tmp_path)
    assert "quantization_config" not in read()
    assert SMALL["vocab_size"] == read()["vocab_size"]
