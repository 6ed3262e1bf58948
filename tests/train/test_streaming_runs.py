"""Runs on texts that are read while training."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import Interrupt, with_callback

from thrifty.errors import ThriftyError
from thrifty.train import stream
from thrifty.train import trainer as module
from thrifty.train.corpus import open_corpus
from thrifty.train.recipe import find_recipe
from thrifty.train.stream import StreamedBlocks
from thrifty.train.tokenizer import train_tokenizer

MICRO = find_recipe("tiny").override(
    vocab_size=280,
    hidden_size=16,
    intermediate_size=32,
    max_position_embeddings=32,
    steps=8,
    batch_size=2,
    sequence_length=16,
    eval_every=4,
    save_every=3,
    document_mask=True,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("few", 20), ("many", 200)):
        rows = [json.dumps({"text": f"Row {n} of {name} " + "and more " * (n % 5)}) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "DOCUMENTS", 40)
        yield [folder / "few.jsonl", folder / "many.jsonl"]


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, train(texts, output)


def train(texts, output, **options):
    corpus = open_corpus(texts, stream=True, shares={"few": 1, "many": 2})
    return module.train(corpus, options.pop("recipe", MICRO), output, console=Console(quiet=True), **options)


def same(a, b):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_interrupted_run_on_a_stream_ends_with_the_same_weights(texts, whole, tmp_path, monkeypatch):
    folder, result = whole
    assert {"data-0.pt", "seal.json"} <= {f.name for f in (folder / "checkpoints/checkpoint-6").iterdir()}
    assert result.record["settings"]["corpus"]["stream"]["few"]["weight"] == 1
    assert result.record["bits_per_byte"] > 0
    with with_callback(Interrupt()), pytest.raises(KeyboardInterrupt):
        train(texts, tmp_path / "cut")
    asked = []
    get = StreamedBlocks.__getitem__
    monkeypatch.setattr(StreamedBlocks, "__getitem__", lambda self, i: (asked.append(i), get(self, i))[1])
    train(texts, tmp_path / "cut", resume=True)
    assert same(folder, tmp_path / "cut")
    assert min(asked) == 6  # the blocks before the checkpoint of step 3 are not made again


def test_a_checkpoint_that_lost_its_place_is_passed_over(texts, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "cut")
    (tmp_path / "cut/checkpoints/checkpoint-8/data-0.pt").unlink()
    with pytest.warns(UserWarning, match="checkpoint-8 is passed over"):
        train(texts, tmp_path / "cut")
    assert same(whole[0], tmp_path / "cut")


def test_a_file_that_changed_is_another_run(texts, whole, tmp_path):
    shutil.copyfile(texts[0], tmp_path / "few.jsonl")
    (tmp_path / "many.jsonl").write_text(texts[1].read_text() + '\n{"text": "one more"}')
    with pytest.raises(ThriftyError, match=r"holds a run with other settings: corpus\."):
        train([tmp_path / "few.jsonl", tmp_path / "many.jsonl"], whole[0])


def test_documents_are_told_apart_where_the_recipe_says_so(texts):
    corpus = open_corpus(texts)
    tokenizer = train_tokenizer(["".join(part.documents) for part in corpus.parts], 280)
    for told in (True, False):
        training = MICRO.override(document_mask=told).training
        blocks, glance, _ = module.training_blocks(corpus, training, tokenizer, 0)
        assert glance is not None
        for one in (blocks[0], glance[0]):
            assert ("position_ids" in one) == told
