import json

import numpy as np
import pytest
import torch

from thrifty.errors import ThriftyError
from thrifty.train import stream as module
from thrifty.train.sources import Files
from thrifty.train.stream import StreamedBlocks

BEGIN = 0
LENGTH = 16


def encode(texts):
    """A document's number, again and again, after the token that begins it."""
    return [np.array([BEGIN] + [int(text.split()[0])] * int(text.split()[1]), np.int32) for text in texts]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Documents 1 ... 99 of one source, 101 ... 399 of another, of various lengths."""
    monkeypatch.setattr(module, "DOCUMENTS", 40)
    monkeypatch.setattr(module, "TOGETHER", 8)
    for name, numbers in (("few", range(1, 100)), ("many", range(101, 400))):
        rows = [json.dumps({"text": f"{n} {n % 37 + 1}"}) for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


def blocks(places, count=200, **options):
    sources = [Files(places / "few.jsonl"), Files(places / "many.jsonl")]
    shares, heldout = options.pop("shares", [1, 3]), options.pop("heldout", [0, 0])
    return StreamedBlocks(sources, shares, heldout, encode, LENGTH, count, options.pop("seed", 0), **options)


def read(dataset, indices=None):
    return torch.stack([dataset[i]["input_ids"] for i in (range(len(dataset)) if indices is None else indices)])


def test_blocks_are_whole_documents_in_an_order_by_seed(places):
    data = read(blocks(places))
    assert data.shape == (200, LENGTH)
    assert torch.equal(data, read(blocks(places)))
    assert not torch.equal(data, read(blocks(places, seed=1)))
    assert not torch.equal(data[0], data[1])
    # Tokens of one source are its documents end to end: between two beginnings is one document, complete.
    few = torch.cat([row for row in data if row.max() < 100]).tolist()
    documents = " ".join(map(str, few)).split(f" {BEGIN} ")[1:-1]
    assert len(documents) > 30
    for document in documents:
        tokens = document.split()
        assert set(tokens) == {tokens[0]}
        assert len(tokens) == int(tokens[0]) % 37 + 1


def test_shares_are_of_blocks_and_sources_are_read_again(places):
    data = read(blocks(places, 800, shares=[3, 1]))
    of_few = (data.amax(1) < 100).float().mean().item()
    assert abs(of_few - 0.75) < 0.05
    seen = data[data.amax(1) < 100].unique()
    assert len(seen) == 100  # every document of the small source, though it takes 120 blocks to read


def test_heldout_documents_are_never_read(places):
    data = read(blocks(places, 600, heldout=[10, 20]))
    assert not ((data > 0) & (data <= 10)).any()
    assert not ((data > 100) & (data <= 120)).any()


@pytest.mark.parametrize("done", [0, 2, 30, 150])
def test_a_restored_stream_goes_on_with_the_same_blocks(places, tmp_path, done, monkeypatch):
    """Sources have ended and begun again by then; the buffer and the half-filled blocks are restored too."""
    whole = read(blocks(places, 400, batch=2))
    first = blocks(places, 400, batch=2)
    read(first, range(2 * done + 2))  # the loader is a batch ahead of the step
    first.save(tmp_path, done)
    resumed = blocks(places, 400, batch=2)
    resumed.restore(tmp_path)
    opened = []
    read_ = Files.read

    def counted(self, point=None):
        opened.append(point)
        return read_(self, point)

    monkeypatch.setattr(Files, "read", counted)
    assert torch.equal(read(resumed, range(2 * done, 400)), whole[2 * done :])
    assert opened[0] is None or opened[0][1][1] > 0
    if done == 30:
        assert None not in opened[:2]  # not from the start


def test_a_sample_may_be_looked_at_first(places):
    data = blocks(places, 40)
    sample = read(data, range(8))
    assert torch.equal(read(data)[:8], sample)
    with pytest.raises(ThriftyError, match="blocks of a stream come in order; got block 0 after 39"):
        data[0]


def test_processes_read_shares_of_their_own(places):
    world = [blocks(places, 120, shares=[1, 1], batch=3, rank=rank, world=2) for rank in range(2)]
    turns = [[i for i in range(120) if i // 3 % 2 == rank] for rank in range(2)]
    parts = [read(dataset, indices) for dataset, indices in zip(world, turns, strict=True)]
    own = [set(part[part > 0].tolist()) for part in parts]
    assert len(own[0]) > 40
    assert not own[0] & own[1]


def test_another_number_of_processes_is_refused(places, tmp_path):
    dataset = blocks(places, rank=0, world=2)
    dataset[0]
    dataset.save(tmp_path, 0)
    rule = r"a stream must go on with as many processes as it began with, 2; got 1; launch 2"
    with pytest.raises(ThriftyError, match=rule):
        blocks(places).restore(tmp_path)
    with pytest.raises(ThriftyError, match="as it began with, 1; got 3"):
        blocks(places, rank=1, world=3).restore(tmp_path)


def test_documents_can_be_told_apart(places):
    block = blocks(places, begin=BEGIN)[20]
    expected, position = [], -1
    for token in block["input_ids"].tolist():
        position = 0 if token == BEGIN else position + 1
        expected.append(position)
    assert block["position_ids"].tolist() == expected
    assert torch.equal(block["labels"], block["input_ids"])
    assert "position_ids" not in blocks(places)[20]


def test_a_source_without_a_document_for_everyone_is_named(places):
    with pytest.raises(ThriftyError, match="every process must find a document in few; number 0 of 1 finds none"):
        read(blocks(places, heldout=[99, 0]))
