import json
import math
import shutil
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import CORPUS, MICRO
from tokenizers import Tokenizer

from thrifty import ops
from thrifty.models import BitNetForCausalLM
from thrifty.nn import BitLinear
from thrifty.train import diagnostics
from thrifty.train import trainer as module

RECIPE = MICRO.override(sequence_length=24, save_every=2)


def train(output, recipe=RECIPE):
    return module.train(CORPUS, recipe, output, console=Console(quiet=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that samples at every other step."""
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "APART", 2)
        return output, train(output).history


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def looks(history):
    """What was seen of the codes, by step."""
    shares = [(e["step"], {k: v for k, v in e.items() if k.startswith(("zeros/", "flipped/"))}) for e in history]
    return {step: found for step, found in shares if found}


def codes(folder):
    model = BitNetForCausalLM.from_pretrained(folder)
    layers = [(name.removeprefix("model."), m) for name, m in model.named_modules() if isinstance(m, BitLinear)]
    return {name: ops.quantize_weight(layer.latent(), layer.kind)[0] for name, layer in layers}


def test_shares_are_those_of_the_codes(run):
    output, history = run
    found = looks(history)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    last = codes(output / "checkpoints/checkpoint-6")
    assert len(last) == 14
    for name, now in last.items():
        assert found[6][f"zeros/{name}"] == pytest.approx((now == 0).double().mean().item())
    changed = [share for step in found.values() for key, share in step.items() if key.startswith("flipped/")]
    assert all(0 <= share <= 1 for share in changed)
    assert max(changed) > 0


def test_flips_are_counted_from_look_to_look(run, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnostics, "LOOKS", 3)
    found = looks(train(tmp_path).history)
    assert list(found) == [2, 4, 6]
    before, after = (codes(tmp_path / f"checkpoints/checkpoint-{step}") for step in (4, 6))
    for name in after:
        assert found[6][f"flipped/{name}"] == pytest.approx((before[name] != after[name]).double().mean().item())


def test_rates_and_speed_are_logged_with_every_loss(run):
    entries = [entry for entry in run[1] if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    for entry in entries:
        assert entry["tokens_per_second"] > 0
        assert entry["grad_norm"] > 0
        assert entry["learning_rate"] / entry["adam_learning_rate"] == pytest.approx(1.5e-3 / 6e-3)


def test_a_held_out_loss_is_also_bits_per_byte(run):
    entries = [entry for entry in run[1] if "eval_loss" in entry]
    # With the end token that begins a document.
    tokens = 1 + len(Tokenizer.from_file(str(run[0] / "tokenizer.json")).encode(CORPUS.heldout).ids)
    nats_to_bits = tokens / len(CORPUS.heldout) / math.log(2)
    for entry in entries:
        assert entry["eval_bits_per_byte"] == pytest.approx(entry["eval_loss"] * nats_to_bits)


def test_samples_begin_with_the_held_out_text(run):
    sampled = [entry for entry in run[1] if "prompt/0" in entry]
    assert [entry["step"] for entry in sampled] == [2, 4, 6]
    assert sampled[0]["prompt/0"] in CORPUS.heldout
    assert sampled[-1]["greedy/0"] != sampled[-1]["seeded/0"]


def test_greedy_samples_are_what_the_model_generates(run):
    model: Any = BitNetForCausalLM.from_pretrained(run[0] / "checkpoints/checkpoint-6").eval()
    prompts = [[5, 6, 7], [8, 9, 10]]
    made = diagnostics.continuations(model, prompts)
    for prompt, (greedy, _) in zip(prompts, made, strict=True):
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
        whole = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert greedy == diagnostics.until(whole, [model.config.eos_token_id])
        assert len(greedy) <= 30
    assert made == diagnostics.continuations(model, prompts)


def test_it_all_is_in_tensorboard_too(run):
    events = EventAccumulator(str(run[0] / "logs"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/adam_learning_rate", "train/tokens_per_second", "eval/bits_per_byte"} <= {
        *tags["scalars"]
    }
    name = "train/zeros/layers.0.self_attn.q_proj"
    values = {event.step: event.value for event in events.Scalars(name)}
    assert values == pytest.approx({s: found[name.removeprefix("train/")] for s, found in looks(run[1]).items()})
    assert any("greedy/0" in tag for tag in tags["tensors"])


def test_the_history_survives_a_resumed_run_and_nothing_else_changes(run, tmp_path, monkeypatch):
    output, history = run
    monkeypatch.setattr(diagnostics, "APART", 2)
    shutil.copytree(output, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-6")
    resumed = train(tmp_path / "cut").history
    assert same(weights(tmp_path / "cut"), weights(output))
    timed = {"seconds", "tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    plain = [
        [{k: v for k, v in e.items() if k not in timed and "train_" not in k} for e in h] for h in (history, resumed)
    ]
    assert json.dumps(plain[0], sort_keys=True) == json.dumps(plain[1], sort_keys=True)


def test_looking_changes_no_weight(run, tmp_path, monkeypatch):
    for method in ("on_train_begin", "on_step_end", "on_log"):
        monkeypatch.setattr(diagnostics.Diagnostics, method, lambda *_, **__: None)
    blind = train(tmp_path)
    assert looks(blind.history) == {}
    assert same(weights(tmp_path), weights(run[0]))


@pytest.mark.parametrize(
    ("steps", "save_every", "interval"), [(6, 2, 1), (400, 200, 8), (10_000, 500, 250), (1000, 7, 7), (50, 100, 1)]
)
def test_looks_are_few_and_fall_on_checkpoints(steps, save_every, interval):
    assert diagnostics.look_interval(steps, save_every) == interval
    assert save_every % interval == 0


@pytest.mark.parametrize(
    ("fields", "kinds"), [({"model": "doge", "keep_window_size": 8}, set()), ({"linear": "binary"}, {"flipped"})]
)
def test_dense_models_have_no_codes_and_binary_ones_no_zeros(tmp_path, fields, kinds):
    history = train(tmp_path, RECIPE.override(**fields, steps=2)).history
    assert {key.partition("/")[0] for found in looks(history).values() for key in found} == kinds
    assert any("greedy/0" in entry for entry in history)
