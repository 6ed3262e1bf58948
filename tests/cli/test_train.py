import json
import os
import subprocess
import sys

import pytest

from thrifty.cli import main
from thrifty.train.recipe import find_recipe

MICRO = [
    "--recipe=tiny",
    "--vocab-size=270",
    "--steps=3",
    "--batch-size=2",
    "--sequence-length=16",
    "--set=hidden_size=16",
    "--set=intermediate_size=32",
    "--set=num_hidden_layers=1",
]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"The {n}th line of a text that counts its lines.\n" for n in range(200)))
    return file


def test_a_file_becomes_a_model_and_the_command_resumes(text, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", str(text), "-o", str(output), *MICRO]) == 0
    first = capsys.readouterr()
    assert first.out == f"{output}\n"
    assert "bits per byte" in first.err
    assert f"thrifty pack {output} {output}-packed" in first.err
    assert main(["train", str(text), "-o", str(output), *MICRO]) == 0
    assert "going on from checkpoint-3" in capsys.readouterr().err


def test_a_mixture_is_streamed_with_the_tokenizer_of_another_run(text, tmp_path, capsys):
    assert main(["train", str(text), "-o", str(tmp_path / "a"), *MICRO]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"row {n} of some rows"}) + "\n" for n in range(100)))
    options = [option for option in MICRO if "vocab" not in option] + [f"--tokenizer={tmp_path / 'a'}", "--stream"]
    options += ["--mix=text=1", "--mix=rows=3", "--set=document_mask=true", f"--heldout={tmp_path / 'judged.txt'}"]
    (tmp_path / "judged.txt").write_text("row 101 of some rows\n" * 5)
    assert main(["train", str(text), str(rows), "-o", str(tmp_path / "b"), *options]) == 0
    assert "text, rows: a stream to train on" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["vocab_size"] == 270
    assert json.loads((tmp_path / "b/training.json").read_text())["settings"]["tokenizer"] == str(tmp_path / "a")


def test_in_a_process_of_its_own_a_data_set_of_bytes(tmp_path):
    rows = "".join(json.dumps({"text": f"row {n} of some rows"}) + "\n" for n in range(100))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text(rows)
    options = [option for option in MICRO if "vocab" not in option]
    done = subprocess.run(
        [sys.executable, "-m", "thrifty", "train", "--dataset=data", "--tokenizer=bytes", *options],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "runs/data\n"), done.stderr
    config = json.loads((tmp_path / "runs/data/config.json").read_text())
    assert config["vocab_size"] == 260
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--recipe=big"], "no recipe is called 'big'"),
        (["--set=foo"], "--set takes FIELD=VALUE; got foo"),
        (["--set=stepz=3"], "did you mean steps?"),
        (["--set=hidden_size=many"], "hidden_size must be a whole number; got many"),
        (["--set=compile=perhaps"], "compile must be true or false; got perhaps"),
        (["--set=num_attention_heads=3"], "3"),
        (["--tokenizer=words"], "a tokenizer that is given has its own pieces; got --vocab-size 270"),
        (["--mix=text=much"], "--mix takes NAME=WEIGHT, a number; got text=much"),
        (["--mix=text=0"], "weights of a mixture must be more than 0; got text=0.0"),
        (["--mix=texts=1"], "a mixture must name the sources; got texts; they are text"),
        (["--tokenizer=bytes", "--vocab-size=300"], "plain bytes have 260 pieces"),
        (["--vocab-size=3"], "at least 260 pieces"),
        (["--heldout=1"], "below 1; got 1"),
        (["--heldout=none.txt"], "none.txt does not exist"),
        (["--resume"], "there must be a checkpoint to resume"),
        (["--max-minutes=0"], "minutes must be more than 0"),
    ],
)
def test_bad_options_are_one_sentence(text, tmp_path, capsys, options, sentence):
    assert main(["train", str(text), "-o", str(tmp_path / "run"), *MICRO, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "run").exists()


def test_a_fresh_run_that_cannot_start_keeps_the_old_one(text, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", str(text), "-o", str(output), *MICRO]) == 0
    before = sorted(output.rglob("*"))
    assert main(["train", str(text), "-o", str(output), *MICRO, "--fresh", "--set=num_attention_heads=3"]) == 2
    assert sorted(output.rglob("*")) == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing(text, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["train", str(text), "-o", str(tmp_path / "run"), *MICRO]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: [save] ")
    assert "tokenizer.json could not be written: no space left on device; free some space" in error
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(("content", "sentence"), [("", "is empty"), ("short", "at least one sequence of 16 tokens")])
def test_a_text_that_is_no_corpus_is_named(tmp_path, capsys, content, sentence):
    file = tmp_path / "text.txt"
    file.write_text(content)
    assert main(["train", str(file), "-o", str(tmp_path / "run"), *MICRO]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_size_of_the_seed_is_a_recipe_that_takes_a_path(tmp_path):
    shape = find_recipe("enwik8").shape
    assert shape is not None
    assert (shape.hidden_size, shape.num_hidden_layers, shape.max_position_embeddings) == (512, 8, 1024)
    file = tmp_path / "enwik8"
    file.write_bytes("<title>A café</title>\n".encode() * 40 + "é".encode()[:1])
    # One of the eight layers: the others are alike, and a step of all of them takes seconds.
    short = ["--steps=1", "--batch-size=1", "--sequence-length=16", "--set=compile=false", "--set=num_hidden_layers=1"]
    assert main(["train", str(file), "-o", str(tmp_path / "run"), "--recipe=enwik8", *short]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["vocab_size"] == 260
