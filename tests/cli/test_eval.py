import json
import math
from typing import Any

import pytest
import torch
from tiny_checkpoints import byte_tokenizer, write_checkpoint

from thrifty.cli import main
from thrifty.models import BitNetConfig, BitNetForCausalLM, round_dense_parameters, save_packed
from thrifty.runtime import load

TEXT = "The dog jumpéd over the fence, twice. " * 30
SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tie_word_embeddings=False).path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A latent folder, its packed copy and a dense folder."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    latent = BitNetForCausalLM(BitNetConfig(**SIZES))
    round_dense_parameters(latent)
    latent.save_pretrained(folder / "latent")
    save_packed(latent, folder / "packed")
    dense = BitNetForCausalLM(BitNetConfig(**SIZES, linear="dense", norm_placement="pre"))
    dense.save_pretrained(folder / "dense")
    for name in ("latent", "packed", "dense"):
        byte_tokenizer().save(str(folder / name / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text"


def evaluated(capsys, *arguments) -> list[dict]:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["text"]["rows"]


def test_every_combination_is_scored_as_the_runtime_scores_it(path, text, capsys):
    rows = evaluated(capsys, path, text, "--head-bits", "16,4", "--cache-bits", "32,8", "--window", "64")
    assert [(row["head_bits"], row["cache_bits"]) for row in rows] == [(16, 32), (16, 8), (4, 32), (4, 8)]
    for row in rows:
        head = row["head_bits"]
        runtime = load(path, head_bits=None if head == 16 else head, cache_bits=row["cache_bits"])
        assert row["perplexity"] == pytest.approx(runtime.perplexity(TEXT, 64))
        assert row["bits_per_byte"] == pytest.approx(runtime.bits_per_byte(TEXT, 64))
        assert (row["engine"], row["weights"]) == ("runtime", "packed")


def test_the_table_shows_what_packing_costs(trained, text, capsys):
    places = [str(trained / name) for name in ("latent", "packed", "dense")]
    assert main(["eval", *places, str(text)]) == 0
    heading, columns, *rows = capsys.readouterr().out.splitlines()
    assert heading == f"{text}: {len(TEXT.encode())} bytes, windows of 64 tokens"
    assert " ".join(columns.split()) == "model weights engine head cache tokens perplexity bits per byte more"
    latent, packed, dense = (row.split() for row in rows)
    assert [row[:3] for row in (latent, packed, dense)] == [
        [places[0], "latent", "torch"],
        [places[1], "packed", "runtime"],
        [places[2], "dense", "torch"],
    ]
    assert latent[-4:] == packed[-4:]
    assert packed[-2:] == ["+0.000", "%"]
    assert float(dense[-3]) != float(latent[-3])
    for row in (latent, packed, dense):
        assert float(row[-3]) == pytest.approx(load(row[0]).bits_per_byte(TEXT, 64), abs=1e-5)


def test_the_engine_can_be_chosen(trained, text, capsys):
    latent, packed = (
        evaluated(capsys, trained / "latent", trained / "packed", text, f"--engine={engine}")
        for engine in ("torch", "runtime")
    )
    assert {row["engine"] for row in latent} == {"torch"}
    assert {row["engine"] for row in packed} == {"runtime"}
    for a, b in zip(latent, packed, strict=True):
        assert a["nats"] == pytest.approx(b["nats"], rel=1e-6)


def test_chosen_bits_are_those_of_the_runtime(trained, text, capsys):
    (row,) = evaluated(capsys, trained / "latent", text, "--head-bits=8")
    assert (row["engine"], row["head_bits"]) == ("runtime", 8)


def test_without_torch_the_runtime_evaluates_latent_weights(trained, text, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (row,) = evaluated(capsys, trained / "latent", text)
    assert row["engine"] == "runtime"


def test_progress_counts_to_the_end(path):
    seen = []
    score = load(path).score(TEXT, 50, 25, lambda done, all: seen.append((done, all)))
    assert seen == sorted(seen)
    assert seen[-1] == (score.tokens, score.tokens)
    assert len(seen) > 10
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / len(TEXT.encode()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{text}", "--head-bits", "7"], "head_bits must be 8, 4 or None; got 7"),
        (["{text}", "--cache-bits", "x"], "--cache-bits are numbers"),
        (["{text}", "--window", "9999"], "window"),
        (["{text}", "--engine", "jax"], "--engine must be one of auto, torch, runtime; got jax"),
        (["{text}", "--engine", "torch", "--head-bits", "8"], "head and cache bits are the runtime's"),
        (["{text}-missing"], "text-missing"),
        (["{binary}"], "must be UTF-8"),
        (["{empty}"], "at least one token"),
    ],
)
def test_errors_are_one_sentence(path, text, tmp_path, capsys, arguments, message):
    places = {"text": text, "binary": tmp_path / "binary", "empty": tmp_path / "empty"}
    places["binary"].write_bytes(b"\xff\xfe")
    places["empty"].write_bytes(b"")
    assert main(["eval", str(path), *(a.format(**places) for a in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("error:") == 1


def test_a_text_without_a_model_is_told(text, capsys):
    assert main(["eval", str(text)]) == 2
    assert "there must be a model" in capsys.readouterr().err
