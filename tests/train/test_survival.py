"""A run that is killed, at any moment, ends as one that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

COMMAND = """
import sys
from pathlib import Path
from rich.console import Console
from thrifty.train.corpus import text_corpus
from thrifty.train.recipe import find_recipe
from thrifty.train.trainer import train

sizes = {"vocab_size": 280, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
recipe = find_recipe("tiny").override(
    **sizes, steps=60, batch_size=2, sequence_length=16, eval_every=30, save_every=2, warmup=3, first_stage=0.5
)
train(text_corpus(Path("text.txt"), 0.05), recipe, Path(sys.argv[1]), console=Console(quiet=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    (tmp_path / "text.txt").write_text(
        "".join(f"The {n}th line of a text that counts its lines.\n" for n in range(400))
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", COMMAND, folder], cwd=tmp_path, env=environment)

    assert start("whole").wait() == 0
    draw, kills = random.Random(0), 0
    saved = tmp_path / "killed/checkpoints"
    while kills < 2:
        before = newest(saved)
        process = start("killed")
        # A few checkpoints further, then somewhere within a step or a save.
        while process.poll() is None and newest(saved) < before + 8:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        kills += 1
    assert start("killed").wait() == 0
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())


def newest(folder):
    return max((int(checkpoint.name.partition("-")[2]) for checkpoint in folder.glob("checkpoint-*")), default=0)
