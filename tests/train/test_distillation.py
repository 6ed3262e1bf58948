import warnings
from functools import partial
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from thrifty.errors import ThriftyError
from thrifty.models import (
    BitNetConfig,
    BitNetForCausalLM,
    CheemsConfig,
    CheemsForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    MatMulFreeConfig,
    MatMulFreeForCausalLM,
    decoder,
)
from thrifty.train import distillation
from thrifty.train.distillation import Distillation, distillation_kl, relation_kl
from thrifty.train.recipe import Training

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "bitnet": (BitNetConfig, BitNetForCausalLM),
    "doge": (DogeConfig, DogeForCausalLM),
    "cheems": (CheemsConfig, CheemsForCausalLM),
    "matmulfree": (MatMulFreeConfig, MatMulFreeForCausalLM),
}
TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": TOKENS, "labels": TOKENS}


def model(family: str = "bitnet", seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    config, kind = FAMILIES[family]
    return kind(config(**SIZES | fields))


def distillation_of(student, teacher, weight: float = 1.0, relations: float = 1.0, **fields: Any) -> Distillation:
    weights: dict[str, Any] = {"distill_weight": weight, "distill_temperature": 2.0, "relation_weight": relations}
    return Distillation(student, teacher, Training(steps=1, batch_size=1, sequence_length=1, **weights | fields))


def test_kl_is_that_of_whole_softmaxes_and_so_are_its_gradients(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 70)  # three rows at once
    torch.manual_seed(0)
    student = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)
    teacher, kept = torch.randn(2, 5, 20), torch.rand(2, 5) < 0.7
    p, q = (logits[kept].float().div(3).softmax(-1) for logits in (teacher, student))
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    loss = distillation_kl(student, teacher, kept, 3.0)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(2 * y, student)[0] for y in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert (ours[~kept] == 0).all()


def test_a_teacher_that_is_the_student_costs_nothing():
    logits = torch.randn(2, 5, 20, requires_grad=True)
    loss = distillation_kl(logits, logits.detach(), torch.ones(2, 5, dtype=torch.bool), 2.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-7


def test_relations_compare_tokens_whatever_the_widths():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 12)
    ours, theirs = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (student, teacher))
    p, q = ((a @ a.mT / a.shape[-1] ** 0.5).softmax(-1) for a in (theirs, ours))
    expected = (p * (p / q).log()).sum(-1).mean()
    loss = relation_kl(student, teacher, 2)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(y, student)[0] for y in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    # A rotation of a head's features leaves what its tokens have in common.
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    turned = (student.unflatten(-1, (2, 4)) @ rotation).flatten(-2)
    assert relation_kl(turned, student, 2).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_from_its_own_kind(family):
    student, teacher = model(family, linear="ternary"), model(family, 1, linear="dense").eval()
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        taught = distillation_of(student, teacher, *weights)
        assert taught.why_no_relations is None
        loss = taught.loss(INPUTS, student(**INPUTS).logits)
        assert loss > 0
        given = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in given)
        taught.close()
    assert not any(module._forward_hooks for m in (student, teacher) for module in m.modules())


def test_a_count_of_the_whole_step_scales_all_parts_and_the_report_adds_them():
    student, teacher = model(), model(seed=1).eval()
    taught = distillation_of(student, teacher)
    whole = taught.loss(INPUTS, student(**INPUTS).logits)
    parts = taught.report()
    assert sum(parts.values()) == pytest.approx(whole.item())
    for _ in range(2):
        taught.loss(INPUTS, student(**INPUTS).logits, torch.tensor(44))  # twice the 22 tokens that are predicted
    assert taught.report(2) == pytest.approx(parts)


def test_a_model_of_transformers_teaches_attention_its_relations():
    student = model()
    wide: dict[str, Any] = SIZES | {"hidden_size": 32}
    llama = LlamaForCausalLM(LlamaConfig(**wide)).eval()
    taught = distillation_of(student, llama)
    taught.loss(INPUTS, student(**INPUTS).logits)
    assert taught.report()["relation_loss"] > 0
    # Its logits alone, where its layers are made otherwise.
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    taught = distillation_of(student, gpt2)
    assert taught.why_no_relations == "student and teacher mix tokens in different ways (attention and unknown)"
    taught.loss(INPUTS, student(**INPUTS).logits)
    assert set(taught.report()) == {"teacher_loss"}


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ThriftyError, match="relation_layer must count layers from the end, -1 to -2; got -3"):
        distillation_of(model(), model(), relation_layer=-3)


def test_relations_are_seen_in_compiled_and_recomputed_layers(monkeypatch):
    decoder._compiled_layer.cache_clear()
    student, teacher = model().train(), model(seed=1).eval()
    taught = distillation_of(student, teacher, 0.0)
    parameter = student.model.layers[0].mlp.up_proj.weight

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(taught.loss(INPUTS, student(**INPUTS).logits), parameter)[0]

    plain = gradient()
    student.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain)
    student.activation_checkpointing_disable()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    student.compile_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of the .grad of its inputs
        torch.testing.assert_close(gradient(), plain, rtol=1e-2, atol=1e-6)
