"""Documents packed in one row by positions that restart."""

import pytest
import torch
from models.suite import MIXTURES, close_in_most, small_model, small_tokens
from torch._dynamo.utils import counters
from transformers import DynamicCache

from thrifty.errors import ThriftyError
from thrifty.models.decoder import _compiled_layer

pytestmark = pytest.mark.usefixtures("quiet")
#: Lengths of the documents of two rows of 24 tokens: single tokens, and more than a window or a chunk holds.
ROWS = ((7, 1, 13, 3), (1, 1, 20, 2))
#: Every mixer, low-bit and dense.
FAMILIES = ("bitnet", "dense", "doge", "doge-old", "cheems", "matmulfree", "all-four", "dense-recurrent-pre")


def packed_rows(rows=ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.tensor([[t for length in row for t in range(length)] for row in rows])
    return small_tokens(len(rows), positions.shape[1]), positions


def apart(tokens, rows=ROWS) -> list[torch.Tensor]:
    """The documents, each a row of its own."""
    return [piece[None] for row, lengths in zip(tokens, rows, strict=True) for piece in row.split(lengths)]


def logits(model, tokens, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.mark.parametrize("mixture", MIXTURES)
def test_documents_of_a_row_do_not_see_each_other(mixture):
    model, (tokens, positions) = small_model(mixture), packed_rows()
    packed = logits(model, tokens, position_ids=positions).flatten(0, 1)
    alone = torch.cat([logits(model, piece)[0] for piece in apart(tokens)])
    close_in_most(packed, alone, 0.98)
    # What comes before a document changes nothing of it, to the bit.
    changed = tokens.clone()
    changed[:, :8] = 3 + (changed[:, :8] - 2) % 90
    after = logits(model, changed, position_ids=positions)
    assert torch.equal(after[0, 8:].flatten(), packed[8:24].flatten())
    assert not torch.equal(after, packed.view_as(after))


@pytest.mark.parametrize("mixture", ["bitnet", "matmulfree", "doge-ternary", "all-four"])
def test_evaluated_low_bit_documents_have_the_bits_they_have_alone(mixture):
    # The head is a product of floats, whose sums depend on the number of rows.
    model, (tokens, positions) = small_model(mixture).model, packed_rows()
    with torch.no_grad():
        alone = torch.cat([model(piece).last_hidden_state[0] for piece in apart(tokens)])
        assert torch.equal(model(tokens, position_ids=positions).last_hidden_state.flatten(0, 1), alone)


def gradients(model, batches) -> list[torch.Tensor]:
    """Of the summed loss over every token with a next one in its document."""
    model.zero_grad()
    for tokens, options in batches:
        labels = tokens.clone()
        if options:
            labels[options["position_ids"] == 0] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            (model(tokens, labels=labels, **options).loss * scored).backward()
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


@pytest.mark.parametrize("mixture", FAMILIES)
def test_gradients_are_those_of_the_documents_alone(mixture):
    model, (tokens, positions) = small_model(mixture).train(), packed_rows()
    packed = gradients(model, [(tokens, {"position_ids": positions})])
    alone = gradients(model, [(piece, {}) for piece in apart(tokens)])
    for name, a, b in zip(dict(model.named_parameters()), packed, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3 * b.abs().max().item(), msg=name)


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_keep_documents_apart(monkeypatch):
    compile_ = torch.compile
    # Traced and differentiated as for any compiler, but not compiled, which takes a minute.
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend="aot_eager_decomp_partition", **kw))
    torch._dynamo.reset()
    _compiled_layer.cache_clear()
    counters.clear()
    model, (tokens, positions) = small_model("all-four").train(), packed_rows()
    expected = gradients(model, [(tokens, {"position_ids": positions})])
    model.compile_layers()
    for seen in (positions, positions.flip(0)):  # where documents lie is no reason to compile again
        got = gradients(model, [(tokens, {"position_ids": seen})])
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    got = gradients(model, [(tokens, {"position_ids": positions})])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    _compiled_layer.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("mixture", ["bitnet", "doge", "cheems", "matmulfree"])
def test_one_document_a_row_is_computed_as_ever(mixture, monkeypatch):
    model, tokens = small_model(mixture), small_tokens()
    expected = logits(model, tokens)

    def refuse(*_):
        raise AssertionError("there are no documents")

    monkeypatch.setattr("thrifty.ops.documents.opening", refuse)
    assert torch.equal(logits(model, tokens, position_ids=torch.arange(12)[None]), expected)
    # A mask of padding says where a row begins, and positions then divide nothing.
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
    close_in_most(got, expected)


def test_positions_of_one_row_serve_a_batch():
    model, (tokens, positions) = small_model("all-four"), packed_rows()
    one = logits(model, tokens, position_ids=positions[:1])
    assert torch.equal(one, logits(model, tokens, position_ids=positions[:1].expand(2, -1)))


def test_a_row_of_documents_may_be_longer_than_the_positions():
    model = small_model("all-four")
    tokens, positions = packed_rows(((60, 40),))
    packed = logits(model, tokens, position_ids=positions)[0, 60:]
    close_in_most(packed, logits(model, tokens[:, 60:])[0])


@pytest.mark.parametrize("mixture", ["bitnet", "all-four"])
def test_documents_are_not_cached(mixture):
    model, (tokens, positions) = small_model(mixture), packed_rows()
    assert model(tokens, position_ids=positions).past_key_values is None
    rule = "documents packed in one row cannot be cached; got position_ids that restart, and a cache"
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ThriftyError, match=rule):
            model(tokens, position_ids=positions, **options)


def test_documents_survive_checkpointed_gradients():
    model, (tokens, positions) = small_model("all-four").train(), packed_rows()
    batch = [(tokens, {"position_ids": positions})]
    expected = gradients(model, batch)
    model.activation_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, batch), expected, strict=True))
