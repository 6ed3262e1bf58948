import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.summary.writer.record_writer import RecordWriter
from tiny_runs import CORPUS, MICRO, TEXT, Interrupt, with_callback
from transformers import TrainerCallback

from thrifty.errors import ThriftyError, ThriftyWarning
from thrifty.models import BitNetForCausalLM
from thrifty.models.decoder import DecoderLayer
from thrifty.runtime import load
from thrifty.train import trainer as module
from thrifty.train.checkpoints import seal
from thrifty.train.corpus import Corpus
from thrifty.train.evaluate import bits_per_byte
from thrifty.train.tokenizer import train_tokenizer


def train(output, **options):
    return module.train(CORPUS, options.pop("recipe", MICRO), output, console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, train(output)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_model_tokenizer_curve_logs_and_record(run):
    output, result = run
    names = {file.name for file in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "loss.png"} <= names
    assert list((output / "logs").iterdir())
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "config.json").read_text())["use_cache"]
    record = json.loads((output / "training.json").read_text())
    assert record == json.loads(json.dumps(result.record))
    assert record["finished"]
    assert record["steps"] == 6
    assert record["settings"]["corpus"]["train_sha256"]


def test_losses_of_both_texts_are_logged(run):
    history = run[1].history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [4, 6]


def test_dense_parameters_are_bf16_values(run):
    tensors = weights(run[0])
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(tensors[name], tensors[name].bfloat16().float())
    latent = tensors["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(latent, latent.bfloat16().float())


def test_the_trained_model_computes_as_the_saved_one(run):
    output, result = run
    tokens = torch.arange(2, 18)[None]
    with torch.no_grad():
        ours = result.model.eval()(tokens).logits
        assert torch.equal(BitNetForCausalLM.from_pretrained(output).eval()(tokens).logits, ours)


def test_the_runtime_gives_the_same_bits_per_byte(run):
    output, result = run
    ours = bits_per_byte(result.model, result.tokenizer, CORPUS.heldout, 16, 4)
    assert load(output).bits_per_byte(CORPUS.heldout, 16, 4) == pytest.approx(ours, rel=1e-5)


def test_the_seed_decides_the_weights(run, tmp_path):
    train(tmp_path / "same")
    train(tmp_path / "other", recipe=MICRO.override(seed=1))
    assert same(weights(tmp_path / "same"), weights(run[0]))
    assert not same(weights(tmp_path / "other"), weights(run[0]))


def test_a_resumed_run_ends_with_the_same_weights(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-6")
    (tmp_path / "cut/model.safetensors").unlink()
    train(tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "cut"), weights(run[0]))


def test_a_half_written_checkpoint_is_passed_over(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "cut")
    (tmp_path / "cut/checkpoints/checkpoint-6/seal.json").unlink()
    with pytest.warns(ThriftyWarning, match="checkpoint-6 is passed over: it was cut off while it was saved"):
        train(tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(run[0]))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run, tmp_path, name):
    shutil.copytree(run[0], tmp_path / "bad")
    file = tmp_path / "bad/checkpoints/checkpoint-6" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(ThriftyWarning, match=f"checkpoint-6 is passed over: {name} is not what was saved"):
        train(tmp_path / "bad")
    assert same(weights(tmp_path / "bad"), weights(run[0]))


def test_a_whole_checkpoint_that_cannot_be_read_is_named(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "bad")
    checkpoint = tmp_path / "bad/checkpoints/checkpoint-6"
    (checkpoint / "optimizer.pt").write_bytes(b"what another version wrote")
    seal(checkpoint)
    with pytest.raises(ThriftyError, match=r"checkpoint-6 cannot be resumed .*; delete that folder"):
        train(tmp_path / "bad")


def test_a_folder_of_another_run_is_refused(run):
    with pytest.raises(ThriftyError, match=r"recipe.training.steps was 6 and is 7; train anew by --fresh"):
        train(run[0], recipe=MICRO.override(steps=7))


def test_a_folder_with_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ThriftyError, match="holds another model"):
        train(tmp_path)


def test_resuming_needs_a_checkpoint(tmp_path):
    with pytest.raises(ThriftyError, match="there must be a checkpoint to resume"):
        train(tmp_path, resume=True)


def test_a_fresh_run_forgets_the_old_one(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "old")
    train(tmp_path / "old", recipe=MICRO.override(steps=2), resume=False)
    assert [f.name for f in (tmp_path / "old/checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_time_limit_lowers_the_steps_and_a_resumed_run_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "seconds_per_step", lambda *_: 19.0)
    assert train(tmp_path, max_minutes=1.0).record["steps"] == 3
    monkeypatch.setattr(module, "seconds_per_step", lambda *_: 60.0)
    assert train(tmp_path, max_minutes=1.0).record["steps"] == 3
    with pytest.raises(ThriftyError, match="minutes must be more than 0"):
        train(tmp_path / "none", max_minutes=0.0)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "doge", "keep_window_size": 8}, "doge"),
        ({"model": "doge", "linear": "ternary", "keep_window_size": 8}, "thrifty"),
        ({"model": "doge", "num_experts": 25, "num_experts_per_tok": 3}, "thrifty"),
        ({"model": "cheems"}, "cheems"),
        ({"model": "matmulfree"}, "matmulfree"),
    ],
)
def test_every_family_trains_and_goes_on_from_its_checkpoint(tmp_path, fields, kind):
    family = MICRO.override(**fields)
    whole = train(tmp_path / "whole", recipe=family)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == kind
    if kind == "cheems":
        assert [whole.model.config.mixer(i) for i in range(2)] == ["ssd", "dynamic_mask"]
    losses = [entry["loss"] for entry in whole.history if "loss" in entry]
    assert losses[-1] < losses[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "checkpoint-6")
    train(tmp_path / "resumed", recipe=family, resume=True)
    assert same(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


def test_a_step_can_be_timed():
    assert MICRO.shape is not None
    model = module.new_model(MICRO.shape, train_tokenizer([TEXT], 280))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert 0 < module.seconds_per_step(model, MICRO.training, count=1) < 60
    assert same(before, dict(model.named_parameters()))


def test_layers_are_compiled_for_training_only(run, tmp_path, monkeypatch):
    calls = []

    def compiled(*args):
        calls.append(torch.is_grad_enabled())
        return DecoderLayer.forward(*args)

    monkeypatch.setattr("thrifty.models.decoder._compiled_layer", lambda: compiled)
    monkeypatch.setattr("thrifty.train.trainer.can_compile", lambda: True)
    train(tmp_path, recipe=MICRO.override(compile=True))
    assert len(calls) == 6 * 2
    assert all(calls)
    assert same(weights(tmp_path), weights(run[0]))


def test_a_full_disk_is_one_sentence_and_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.CausalTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(ThriftyError, match=r"checkpoint-4 could not be written: .*No space left on device; free some"):
        train(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_that_fills_up_while_logging_is_one_sentence(tmp_path, monkeypatch, capsys):
    write, written = RecordWriter.write, []

    def full(self, data):
        written.append(data)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(ThriftyError, match=r"logs could not be written: no space left on device; free some space"):
        train(tmp_path)
    assert "Traceback" not in capsys.readouterr().err


class Break(TrainerCallback):
    """Makes a weight NaN after a step."""

    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if model is not None and state.global_step + 1 == self.step:
            model.model.norm.weight.data[3] = torch.nan


def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path):
    sentence = r"got nan in step 3, whose batch is in .*diverged.json; train anew"
    with with_callback(Break(2)), pytest.raises(ThriftyError, match=sentence):
        train(tmp_path)
    kept = json.loads((tmp_path / "diverged.json").read_text())
    assert kept["step"] == 3
    assert (len(kept["batch"]["input_ids"]), len(kept["batch"]["input_ids"][0])) == (2, 16)
    assert all("line of a text" in text or "counts" in text for text in kept["texts"])
    assert len(kept["learning_rates"]) == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    sentence = r"model.norm.weight is not after step 4; train anew"
    with with_callback(Break(4)), pytest.raises(ThriftyError, match=sentence):
        train(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_interrupted_run_goes_on(run, tmp_path):
    with with_callback(Interrupt()), pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    train(tmp_path)
    assert same(weights(tmp_path), weights(run[0]))


def test_a_text_without_a_heldout_part_trains(tmp_path):
    result = module.train(
        Corpus("lines", CORPUS.parts, ""), MICRO.override(steps=2), tmp_path, console=Console(quiet=True)
    )
    assert result.record["bits_per_byte"] is None
