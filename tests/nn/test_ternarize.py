"""Any model made ternary: what is kept, what is skipped and why, what the record says."""

import copy
from typing import Any

import pytest
import torch
import transformers

from thrifty import nn
from thrifty.errors import ThriftyError
from thrifty.nn.ternarize import reads_weight

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER: dict[str, Any] = {**SIZES, "vocab_size": 50, "num_key_value_heads": 1, "head_dim": 16}
T5: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 50}

MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**SIZES, vocab_size=50)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2
        ),
    ),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**DECODER)),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**DECODER)),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**SIZES, image_size=16, patch_size=4)),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5)),
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(**DECODER, num_local_experts=4)),
    "neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SIZES, vocab_size=50)),
}
#: Layers replaced in each, and the names of what is left.
EXPECTED = {
    "bert": (13, {"classifier"}),
    "gpt2": (8, {"lm_head"}),
    "llama": (14, {"lm_head"}),
    "qwen2": (14, {"lm_head"}),
    "qwen3": (14, {"lm_head"}),
    "vit": (12, {"classifier"}),
    "t5": (32, {"lm_head"}),
    "mixtral": (8, {"lm_head", *(f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in ("gate", "experts"))}),
    "neox": (8, {"lm_head"}),
}
GENERATES = [name for name in MODELS if name not in ("bert", "vit")]


MODELS["t5"][1].decoder_start_token_id = 0


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    kind, config = MODELS[name]
    return kind(copy.deepcopy(config)).eval()


def answer(name: str, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 6), generator=generator)
    if name == "vit":
        dtype = next(model.parameters()).dtype
        return model(torch.randn(2, 3, 16, 16, generator=generator).to(dtype)).logits
    return model(ids, decoder_input_ids=ids[:, :2]).logits if name == "t5" else model(ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_weights_stay_and_the_head_and_routers_are_left(name):
    model = make(name)
    before = {key: (id(p), p.data_ptr(), p.shape) for key, p in model.named_parameters(remove_duplicate=False)}
    dense = answer(name, model)
    record = nn.ternarize(model)
    assert (len(record.replaced), {layer.name for layer in record.skipped}) == EXPECTED[name]
    after = {key: (id(p), p.data_ptr(), p.shape) for key, p in model.named_parameters(remove_duplicate=False)}
    assert after == before
    low = answer(name, model)
    assert not torch.equal(low, dense)
    model.train()
    answer(name, model).sum().backward()
    replaced = [model.get_submodule(layer.name) for layer in record.replaced]
    assert all(isinstance(layer, nn.BitLinear) and layer.training for layer in replaced)
    assert all(layer.weight.grad.abs().sum() > 0 for layer in replaced)


@pytest.mark.parametrize("name", MODELS)
def test_a_predicate_that_takes_nothing_changes_nothing(name):
    model = make(name)
    dense = answer(name, model)
    record = nn.ternarize(model, lambda *_: False)
    assert record.replaced == ()
    assert torch.equal(answer(name, model), dense)


@pytest.mark.parametrize("name", MODELS)
def test_the_packed_model_answers_alike_and_has_the_bytes_of_the_record(name):
    model = make(name)
    record = nn.ternarize(model, norm="sub_ln")
    packed: Any = nn.pack(model)
    with torch.no_grad():
        assert torch.equal(answer(name, packed), answer(name, model))
    layers = [m for m in packed.modules() if isinstance(m, nn.PackedBitLinear)]
    held = [t for layer in layers for t in layer.buffers()] + list(packed.parameters())
    assert sum(t.numel() * t.element_size() for t in held) == record.bytes_packed
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == record.bytes_before
    other: Any = nn.pack(model)
    for layer in other.modules():
        if isinstance(layer, nn.PackedBitLinear):
            layer.packed.zero_()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(answer(name, other), answer(name, packed))


@pytest.mark.parametrize("name", GENERATES)
def test_packed_and_latent_models_generate_the_same(name):
    model = make(name)
    nn.ternarize(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    packed: Any = nn.pack(model)
    assert torch.equal(packed.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_bfloat16_stays(name):
    model = make(name).to(torch.bfloat16)
    nn.ternarize(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    packed: Any = nn.pack(model)
    with torch.no_grad():
        y = answer(name, packed)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, answer(name, model))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_memory_gets_its_weights_later(name):
    model = make(name)
    kind, config = MODELS[name]
    with torch.device("meta"):
        empty = kind(copy.deepcopy(config)).eval()
    record = nn.ternarize(empty)
    assert all(p.is_meta for p in empty.parameters())
    assert record == nn.ternarize(model)
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert all(torch.equal(a, b) for a, b in zip(empty.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_saved_model_is_loaded_by_plain_transformers_and_made_ternary_again(name, tmp_path):
    model = make(name)
    nn.ternarize(model)
    model.save_pretrained(tmp_path)
    again = MODELS[name][0].from_pretrained(tmp_path)
    assert not any(isinstance(m, nn.BitLinear) for m in again.modules())
    nn.ternarize(again.eval())
    assert torch.equal(answer(name, again), answer(name, model))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_unpacked_models_have_the_layout_they_had(name):
    model = make(name)
    nn.ternarize(model)
    unpacked: Any = nn.unpack(nn.pack(model))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in unpacked.state_dict().items()} == shapes
    with torch.no_grad():
        assert torch.equal(answer(name, unpacked), answer(name, model))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layers_compute_what_a_bit_linear_does(kind):
    torch.manual_seed(0)
    dense = torch.nn.Linear(20, 12) if kind == "linear" else transformers.pytorch_utils.Conv1D(12, 20)
    weight = dense.weight if kind == "linear" else dense.weight.T
    expected = nn.BitLinear(20, 12)
    expected.load_state_dict({"weight": weight, "bias": dense.bias})
    x = torch.randn(3, 20)
    nn.ternarize(dense)
    assert torch.equal(dense(x), expected(x))
    dense(x).square().sum().backward()
    expected(x).square().sum().backward()
    grad: Any = dense.weight.grad
    expected_grad: Any = expected.weight.grad
    assert torch.allclose(grad if kind == "linear" else grad.T, expected_grad, rtol=1e-5, atol=1e-6)
    assert "in_features=20, out_features=12" in repr(dense)


def test_hooks_and_references_and_frozen_weights_stay():
    shared = torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), shared, shared, torch.nn.Linear(8, 8))
    model[0].weight = model[3].weight
    model[3].requires_grad_(False)
    seen: list[torch.nn.Module] = []
    handle = shared.register_forward_hook(lambda module, *_: seen.append(module))
    record = nn.ternarize(model)
    assert [layer.name for layer in record.replaced] == ["0", "1", "3"]
    assert model[1] is model[2] is shared
    assert model[0].weight is model[3].weight
    assert not model[3].weight.requires_grad
    model(torch.randn(2, 8))
    assert seen == [shared, shared]
    handle.remove()
    model(torch.randn(2, 8))
    assert len(seen) == 2
    assert record.bytes_before == (2 * 64 + 3 * 8) * 4


def test_sharded_parameters_stay_sharded(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
        model: Any = copy.deepcopy(plain)
        nn.ternarize(plain)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        nn.ternarize(model)
        assert isinstance(model[0].weight, DTensor)
        x = torch.randn(3, 16)
        y = model(x)
        assert torch.equal(y, plain(x))
        y.sum().backward()
        assert isinstance(model[0].weight.grad, DTensor)
        alone: Any = fully_shard(torch.nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ThriftyError, match="sharded as a module of its own"):
            nn.ternarize(alone)
    finally:
        distributed.destroy_process_group()


class Reader(torch.nn.Module):
    """Computes with the weight of one layer itself, and asks another for its dtype."""

    def __init__(self):
        super().__init__()
        self.alias = self.read = torch.nn.Linear(8, 8)
        self.asked = torch.nn.Linear(8, 8)
        self.special = type("Special", (torch.nn.Linear,), {"forward": lambda self, x: x})(8, 8)
        torch.nn.init.zeros_(self.asked.weight)

    def forward(self, x):
        return self.asked(x.to(self.asked.weight.dtype)) @ self.read.weight.T


def test_layers_whose_weight_is_read_elsewhere_are_left():
    model = Reader()
    record = nn.ternarize(model)
    assert [layer.name for layer in record.replaced] == ["asked"]
    notes = {layer.name: layer.note for layer in record.skipped}
    assert notes == {"alias": "Reader reads its weight", "special": "Special has a forward of its own"}
    assert reads_weight(torch.nn.MultiheadAttention, "out_proj")
    assert not reads_weight(transformers.models.t5.modeling_t5.T5DenseActDense, "wo")


class Local(torch.nn.Module):
    """Multiplies by the weights of its layers itself, under names that are not theirs."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        for layer in (self.one, self.two):
            x = torch.nn.functional.linear(x, layer.weight, layer.bias)
        return x


def test_layers_whose_weight_is_read_under_a_local_name_are_left():
    model = torch.nn.Sequential(Local(), torch.nn.Linear(8, 8))
    assert {layer.name for layer in nn.ternarize(model).replaced} == {"0.layers.0", "1"}


def test_sub_ln_without_a_projection_it_knows_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.raises(ThriftyError, match="none has one here"):
        nn.ternarize(model, norm="sub_ln")
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layers.0.q_proj.lora_A.default", "low-rank adapter"),
        ("lm_head", "output head"),
        ("cls.predictions.transform.dense", "output head"),
        ("cls.seq_relationship", "output head"),
        ("discriminator_predictions.dense", "output head"),
        ("pre_classifier", "output head"),
        ("fc", "output head"),
        ("text_projection", "output head"),
        ("layers.0.mlp.router.classifier", "router"),
        ("layers.0.mlp.gate", "router"),
        ("layers.0.mlp.shared_expert_gate", "router"),
        ("layers.0.dt_proj", "router"),
        ("layers.0.fc", None),
        ("layers.0.mlp.gate_proj", None),
        ("layers.0.mlp.gate_up_proj", None),
        ("layers.0.heads_proj", None),
        ("pooler.dense", None),
    ],
)
def test_heads_and_routers_are_known_by_their_names(name, reason):
    model = torch.nn.Module()
    *parents, leaf = name.split(".")
    owner = model
    for part in parents:
        child = torch.nn.Module()
        owner.add_module(part, child)
        owner = child
    owner.add_module(leaf, torch.nn.Linear(8, 4))
    model.add_module("other", torch.nn.Linear(8, 8))
    record = nn.ternarize(model)
    assert {layer.name: layer.note for layer in record.skipped} == ({name: reason} if reason else {})


def test_what_a_model_calls_its_output_embeddings_is_a_head():
    model: Any = torch.nn.ModuleDict({"words": torch.nn.Linear(8, 4), "other": torch.nn.Linear(8, 8)})
    model.get_output_embeddings = lambda: model["words"]
    assert {layer.name: layer.note for layer in nn.ternarize(model).skipped} == {"words": "output head"}


def test_the_gate_of_a_glu_is_no_router():
    model = torch.nn.ModuleDict({"gate": torch.nn.Linear(8, 16)})
    assert [layer.name for layer in nn.ternarize(model).replaced] == ["gate"]


def test_torchs_fused_encoder_does_not_pass_the_layers_by():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    record = nn.ternarize(model)
    assert {entry.name.split(".")[2] for entry in record.replaced} == {"linear1", "linear2"}
    x, mask = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=mask)  # gradients keep off the fast path
    with torch.no_grad():
        assert torch.allclose(model(x, src_key_padding_mask=mask), expected, atol=1e-6)
        assert torch.allclose(nn.pack(model)(x, src_key_padding_mask=mask), expected, atol=1e-6)


def test_where_and_also_decide():
    model = make("bert")
    asked = []
    record = nn.ternarize(model, lambda name, _: bool(asked.append(name)) or ".0." in name, also=["classifier"])
    assert "classifier" not in asked
    assert len(asked) == 13
    assert {layer.name for layer in record.replaced} == {name for name in asked if ".0." in name} | {"classifier"}
    assert {layer.note for layer in record.skipped} == {"left by the predicate"}
    again = nn.ternarize(model)
    assert len(again.replaced) == 7
    assert {layer.note for layer in again.skipped} == {"low-bit already"}


def test_a_head_tied_to_the_embedding_stays_tied():
    model = make("llama")
    nn.ternarize(model, also=["lm_head"])
    assert isinstance(model.lm_head, nn.BitLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_tied_to_an_embedding_is_left():
    model = torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(9, 8), "back": torch.nn.Linear(8, 9), "on": torch.nn.Linear(8, 8)}
    )
    model["back"].weight = model["table"].weight
    record = nn.ternarize(model)
    assert {layer.name: layer.note for layer in record.skipped} == {"back": "tied to an embedding"}


def test_norms_go_where_they_are_asked_for():
    def norms(name: str, norm) -> dict[str, Any]:
        model = make(name)
        return {layer.name: model.get_submodule(layer.name).norm for layer in nn.ternarize(model, norm=norm).replaced}

    assert set(norms("bert", "layer").values()) == {"layer"}
    assert set(norms("bert", None).values()) == {None}
    written = {
        "bert": {"attention.output.dense", "output.dense"},
        "gpt2": {"attn.c_proj", "mlp.c_proj"},
        "llama": {"o_proj", "down_proj"},
        "t5": {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"},
        "vit": {"o_proj", "fc2"},
        "neox": {"attention.dense", "mlp.dense_4h_to_h"},
    }
    for name, endings in written.items():
        for layer, norm in norms(name, "sub_ln").items():
            assert norm == ("rms" if layer.endswith(tuple(endings)) else None), layer
    chosen = norms("vit", lambda name, module: "rms" if module.in_features == 64 else None)
    assert {name for name, norm in chosen.items() if norm} == {f"vit.layers.{i}.mlp.fc2" for i in (0, 1)}


def test_the_record_is_a_table():
    from rich.console import Console

    model = make("bert")
    record = nn.replace_linears_in_hf(model)
    text = str(record)
    assert "13 layers replaced, 1 left" in text
    assert "bert.encoder.layer.{0-1}.attention.self.query" in text
    assert "output head" in text
    assert "times smaller" in text
    assert max(map(len, text.splitlines())) <= 120
    console = Console(width=120, record=True)
    with console.capture() as captured:
        console.print(record)
    assert "bert.pooler.dense" in captured.get()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "quaternary"}, r"weight must be one of ternary, binary; got 'quaternary'"),
        ({"norm": "batch"}, r"norm must be 'rms', 'layer', None, 'sub_ln' or a function.*; got 'batch'"),
        ({"norm": lambda *_: "batch"}, r"got 'batch'"),
        ({"also": "lm_head"}, r"also must be a collection of names; got the text 'lm_head'"),
        ({"also": ["nowhere"]}, r"also must name linear layers of the model; got 'nowhere'"),
    ],
)
def test_wrong_options_leave_the_model_untouched(options, message):
    model = make("llama")
    with pytest.raises(ThriftyError, match=message):
        nn.ternarize(model, **options)
    assert not any(isinstance(module, nn.BitLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"weight": 1}, r"model must be a torch.nn.Module; got dict"),
        (
            torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.LayerNorm(3)),
            r"layers of the kinds Conv2d, LayerNorm",
        ),
        (torch.nn.Sequential(torch.nn.ReLU()), r"a model without parameters"),
        (torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 4)}), r"lm_head \(output head\)"),
        (torch.nn.Sequential(nn.BitLinear(4, 4)), r"0 \(low-bit already\)"),
        (torch.nn.Sequential(torch.nn.LazyLinear(4)), r"'0.weight' without; run the model once"),
        (
            torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4)),
            r"Linear has a forward|its weight is comp",
        ),
    ],
)
def test_a_model_with_nothing_to_replace_is_told_so(model, message):
    with pytest.raises(ThriftyError, match=message):
        nn.ternarize(model)
