"""Two processes on one machine (gloo): the same run as one, sharded or not, and failures that leave nobody waiting."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train.distributed_worker as worker
from safetensors.torch import load_file
from torch import distributed

from thrifty.cli import main
from thrifty.ops.sharded_weight import pack_codes, unpack_codes
from thrifty.train import trainer
from thrifty.train.tokenizer import train_tokenizer

WORKER = Path(worker.__file__)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
ACCELERATE = (*ACCELERATE, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo"
)


def launch(launcher: tuple[str, ...], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes that share the machine; a hang is a failure."""
    command = [sys.executable, "-m", *launcher, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def run(output: Path, recipe: worker.Recipe) -> list[float]:
    """The run in this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "has_fast_bf16", lambda: False)
        try:
            return worker.run(output, recipe)
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs alone, and what two processes made of the same, and of a checkpoint of one."""
    folder = tmp_path_factory.mktemp("runs")
    alone = {
        "alone": run(folder / "alone", worker.MICRO),
        "experts alone": run(folder / "experts alone", worker.EXPERTS),
        "sharded alone": run(folder / "sharded alone", worker.MICRO.override(sharding="fsdp-2bit")),
    }
    worker.cut(folder / "sharded alone", folder / "one to two")
    done = launch(TORCHRUN, WORKER, "main", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    (first, spoken), (second, other) = json.loads((folder / "seen.json").read_text())
    assert first == second
    (folder / "seen.json").write_text(json.dumps(first | alone | {"commands": [spoken, other]}))
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return json.loads((folder / "seen.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["ddp", "parts", "fsdp", "fsdp-2bit"])
def test_two_processes_do_what_one_does(folder, seen, name):
    assert seen[name] == pytest.approx(seen["alone"], rel=1e-5)
    torch.testing.assert_close(weights(folder / name), weights(folder / "alone"), rtol=0, atol=2e-5)


def test_experts_are_balanced_as_by_one_process(seen):
    # The balance is that of a process' own tokens, so the runs are near, not equal.
    assert seen["experts"] == pytest.approx(seen["experts alone"], rel=1e-3)


def test_gathered_codes_are_those_of_gathered_floats(folder, seen):
    assert seen["fsdp-2bit"] == seen["fsdp"]
    floats, codes = weights(folder / "fsdp"), weights(folder / "fsdp-2bit")
    assert all(torch.equal(floats[name], codes[name]) for name in floats | codes)


def test_codes_are_a_sixteenth_of_the_bytes(seen):
    # Embedding and norms travel as floats either way.
    shape: Any = worker.MICRO.shape
    model = trainer.new_model(shape, train_tokenizer([worker.TEXT], 281))
    ternary = {name: p.numel() for name, p in model.named_parameters() if "_proj" in name}
    assert seen["fsdp bytes"] - seen["fsdp-2bit bytes"] > 0.9 * 4 * sum(ternary.values())


@pytest.mark.parametrize("name", ["ddp resumed", "fsdp-2bit resumed", "one to two"])
def test_checkpoints_go_on(folder, seen, name):
    source = {"ddp resumed": "ddp", "fsdp-2bit resumed": "fsdp-2bit", "one to two": "alone"}[name]
    assert seen[name] == pytest.approx(seen[source], rel=1e-5)
    torch.testing.assert_close(weights(folder / name), weights(folder / source), rtol=0, atol=2e-5)


def test_shards_of_two_processes_are_resumed_by_one(folder, seen, tmp_path):
    worker.cut(folder / "fsdp-2bit", tmp_path / "run")
    losses = run(tmp_path / "run", worker.MICRO.override(sharding="fsdp-2bit"))
    assert losses == pytest.approx(seen["alone"], rel=1e-5)


def test_a_sharded_run_leaves_what_any_run_does(folder):
    left = [{file.name for file in (folder / name).iterdir()} for name in ("alone", "ddp", "fsdp-2bit")]
    assert left[0] == left[1] == left[2]
    for name in ("ddp", "fsdp-2bit"):
        assert len(list((folder / name / "logs").iterdir())) == 1
        assert json.loads((folder / name / "training.json").read_text())["processes"] == 2


def test_what_the_first_process_refuses_is_refused_by_all(seen):
    assert seen["refusal"] == "[train] no"
    assert "batch_size must be a multiple of 2 processes times accumulate = 1; got 5; choose 6" in seen["batch"]


def test_a_batch_is_refused_before_a_text_is_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", str(tmp_path / "none.txt"), "--recipe", "tiny", "--set", "accumulate=2"]) == 2
    assert "multiple of 3 processes times accumulate = 2; got 8; choose 12" in capsys.readouterr().err


def test_the_command_speaks_once(folder, seen):
    (code, out, err), other = seen["commands"]
    assert code == "0"
    assert out.split() == [str(folder / "command")]
    assert "2 processes, which compute 4 sequences each at once" in err
    assert err.count("held-out text:") == 2
    assert other == ["0", "", ""]


def test_a_process_that_fails_ends_the_others(tmp_path):
    done = launch(ACCELERATE, WORKER, "fail", tmp_path)
    assert done.returncode != 0
    assert "exitcode: 3" in done.stderr.replace(" ", "").replace("exitcode:", "exitcode: ")
    assert not (tmp_path / "fails" / "model.safetensors").exists()


@pytest.mark.parametrize("columns", [1, 4, 7, 64])
def test_codes_come_back_from_two_bits(columns):
    codes = torch.randint(-1, 2, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(columns))
    packed = pack_codes(codes)
    assert packed.shape == (5, -(-columns // 4))
    assert torch.equal(unpack_codes(packed, columns), codes)
