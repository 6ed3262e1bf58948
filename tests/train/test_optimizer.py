import copy

import pytest
import torch
from torch import nn

from thrifty.train.optimizer import Schedule, build_optimizer, learning_rate_factor, orthogonalize
from thrifty.train.recipe import find_recipe

TRAINING = find_recipe("tiny").training


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {
        "embed_tokens": nn.Embedding(7, 6),
        "wide": nn.Linear(6, 10),
        "tall": nn.Linear(10, 6),
        "norm": nn.LayerNorm(6),
    }
    return nn.ModuleDict(layers)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    for _ in range(count):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def test_muon_takes_the_inner_matrices_only():
    net = model()
    muon, adam = build_optimizer(net, TRAINING).param_groups
    assert {id(p) for p in muon["params"]} == {id(net["wide"].weight), id(net["tall"].weight)}
    assert len(adam["params"]) == 5


@pytest.mark.parametrize("shape", [(2, 5, 5), (3, 4, 9)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    assert ((values > 0.6) & (values < 1.3)).all()


def test_adam_group_equals_torch():
    net, twin = model(), model()
    ours = build_optimizer(net, TRAINING)
    theirs = torch.optim.AdamW(
        twin.parameters(), lr=TRAINING.adam_learning_rate, betas=(TRAINING.beta1, TRAINING.beta2), weight_decay=0.0
    )
    steps(net, ours, 5, 1)
    steps(twin, theirs, 5, 1)
    torch.testing.assert_close(net["norm"].weight, twin["norm"].weight)
    torch.testing.assert_close(net["embed_tokens"].weight, twin["embed_tokens"].weight)


def test_an_entry_of_a_step_has_the_size_of_the_rate():
    net = model()
    weight = dict(net.named_parameters())["wide.weight"]
    before = weight.detach().clone()
    steps(net, build_optimizer(net, TRAINING), 1, 1)
    change = weight - before
    assert 0.5 < change.square().mean().sqrt() / TRAINING.learning_rate < 1.5


def test_state_comes_back():
    net = model()
    optimizer = build_optimizer(net, TRAINING)
    steps(net, optimizer, 3, 1)
    twin = copy.deepcopy(net)
    resumed = build_optimizer(twin, TRAINING)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(net, optimizer, 3, 2)
    steps(twin, resumed, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_the_learning_rate_rises_holds_and_falls():
    factors = [learning_rate_factor(step, 200, TRAINING) for step in range(201)]
    assert factors[0] == 1 / TRAINING.warmup
    assert factors[TRAINING.warmup : 60] == [1.0] * (60 - TRAINING.warmup)
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert factors[200] == TRAINING.floor


TWO_STAGES = find_recipe("tiny").override(first_stage=0.5, weight_decay=0.1).training


def test_the_second_stage_begins_lower():
    factors = [learning_rate_factor(step, 200, TWO_STAGES) for step in range(201)]
    assert factors[99] == pytest.approx(TWO_STAGES.first_floor, abs=0.02)
    assert factors[100] == TWO_STAGES.second_rate
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert factors[200] == 0


def test_weight_decay_ends_with_the_first_stage_also_when_resumed():
    def run(count, state=None):
        optimizer = build_optimizer(net, TWO_STAGES)
        schedule = Schedule(optimizer, 10, TWO_STAGES)
        if state is not None:
            optimizer.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
        decays = []
        for _ in range(count):
            decays.append(optimizer.param_groups[0]["weight_decay"])
            steps(net, optimizer, 1, 0)
            schedule.step()
        return decays, (optimizer.state_dict(), schedule.state_dict())

    net = model()
    first, state = run(4)
    second, _ = run(6, state)
    assert first + second == [0.1] * 5 + [0.0] * 5
