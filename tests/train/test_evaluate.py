import math

import pytest
import torch

from thrifty.errors import ThriftyError
from thrifty.models import BitNetConfig, BitNetForCausalLM
from thrifty.train.evaluate import bits_per_byte
from thrifty.train.tokenizer import SMALLEST, train_tokenizer

TOKENIZER = train_tokenizer([], SMALLEST)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BitNetForCausalLM(
        BitNetConfig(
            vocab_size=SMALLEST,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def test_a_model_that_knows_nothing_pays_for_the_vocabulary(model):
    with torch.no_grad():
        head = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()
    assert bits_per_byte(model, TOKENIZER, "any text " * 9) == pytest.approx(math.log2(SMALLEST))
    with torch.no_grad():
        model.lm_head.weight.copy_(head)


def test_a_text_in_one_window_is_its_loss(model):
    text = "twenty-four characters.."
    ids = torch.tensor([[0, *TOKENIZER.encode(text).ids]])
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert bits_per_byte(model, TOKENIZER, text) == pytest.approx(loss / math.log(2), rel=1e-5)


def test_how_windows_are_batched_changes_nothing(model, monkeypatch):
    text = "a text of more than one window, so that there is something to batch; " * 3
    together = bits_per_byte(model, TOKENIZER, text, 8, 3)
    monkeypatch.setattr("thrifty.train.evaluate.BATCH_TOKENS", 1)
    assert bits_per_byte(model, TOKENIZER, text, 8, 3) == pytest.approx(together, rel=1e-6)


def test_the_mode_of_the_model_stays(model):
    model.train()
    bits_per_byte(model, TOKENIZER, "text")
    assert model.training


def test_the_mode_of_the_model_stays_when_scoring_is_interrupted(model, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    model.train()
    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bits_per_byte(model, TOKENIZER, "text")
    assert model.training


@pytest.mark.parametrize(("text", "window"), [("", 8), ("text", 33), ("text", 0)])
def test_what_cannot_be_scored_is_refused(model, text, window):
    with pytest.raises(ThriftyError, match=r"\[evaluate\]"):
        bits_per_byte(model, TOKENIZER, text, window)
