import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thrifty.cli import main
from thrifty.cli.demo import parity
from thrifty.train.corpus import Corpus, Part
from thrifty.train.recipe import find_recipe

TEXT = "".join(f"The {n}th line of a text that counts its lines.\n" for n in range(300))


@pytest.fixture
def _small(monkeypatch):
    """The demo on a text of a few lines with a model of a few weights."""
    corpus = Corpus("lines", (Part("text", (TEXT,)),), "The last line of a text.\n" * 20)
    micro = find_recipe("tiny").override(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=32,
        max_position_embeddings=256,
        steps=3,
        batch_size=2,
        sequence_length=32,
        eval_every=3,
    )
    monkeypatch.setattr("thrifty.train.corpus.builtin_corpus", lambda: corpus)
    monkeypatch.setattr("thrifty.train.recipe.find_recipe", lambda _: micro)


@pytest.mark.usefixtures("_small")
def test_the_whole_flow_ends_with_a_page_and_can_be_repeated(tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "-o", str(output)]) == 0
    text = capsys.readouterr().out
    for words in ("bits per byte", "gzip -9", "xz -9", "sha256", "greedy tokens", "smaller", "thrifty generate"):
        assert words in text
    results = json.loads((output / "results.json").read_text())
    bits = results["bits_per_byte"]
    assert bits["packed"] == pytest.approx(bits["torch"], rel=1e-5)
    assert bits["xz -9 primed"] < bits["xz -9"]
    assert results["greedy"] == {"tokens": 200, "equal": True, "first_difference": None}
    parity = results["parity"]
    assert (parity["positions"], parity["mismatches"]) == (200, 0)
    assert parity["clear"] > 100
    assert f"{parity['clear']} of 200 held-out positions" in " ".join(text.replace("│", " ").split())
    assert all(speed > 0 for speed in results["tokens_per_second"].values())
    assert results["bytes"]["packed"] < results["bytes"]["fp32"]
    assert (output / "model/loss.png").exists()

    assert main(["demo", "-o", str(output)]) == 0
    again = capsys.readouterr()
    assert "going on from checkpoint-3" in again.err
    assert json.loads((output / "results.json").read_text())["sample"] == results["sample"]


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("greedy_in_runtime", lambda *_: [0] * 200, "must write the same 200 tokens; they differ from token"),
        ("parity", lambda *_: {"positions": 200, "clear": 190, "mismatches": 3}, "3 of 190 clear positions differ"),
    ],
)
def test_a_runtime_that_differs_fails_after_the_page(tmp_path, capsys, monkeypatch, name, wrong, sentence):
    monkeypatch.setattr(f"thrifty.cli.demo.{name}", wrong)
    assert main(["demo", "-o", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "what was gained" in shown.out
    assert sentence in shown.err.splitlines()[-1]
    assert (tmp_path / "results.json").exists()


def test_parity_counts_only_what_torch_is_sure_of():
    theirs = torch.tensor([[0.0, 1.0, 0.9], [0.0, 1.0, 0.9], [0.0, 1.0, 0.9999]])
    model = lambda _: SimpleNamespace(logits=theirs[None])  # noqa: E731
    runtime = SimpleNamespace(logits=lambda _: np.array([[0, 1, 0], [0, 0, 1], [0, 0, 1]]))
    assert parity(model, runtime, [1, 2, 3]) == {"positions": 3, "clear": 2, "mismatches": 1}  # pyright: ignore
