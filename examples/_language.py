"""What the examples share: small language models of Python's own documentation."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from thrifty.models import ThriftyForCausalLM
from thrifty.train.blocks import PackedBlocks
from thrifty.train.corpus import builtin_corpus
from thrifty.train.initial import initialize
from thrifty.train.optimizer import Schedule, build_optimizer
from thrifty.train.packing import encode
from thrifty.train.recipe import find_recipe
from thrifty.train.tokenizer import END, train_tokenizer


@dataclass(frozen=True)
class Text:
    """The built-in corpus of `thrifty train` as tokens: blocks to train on, and the held-out text."""

    tokenizer: Tokenizer
    blocks: PackedBlocks
    heldout: str
    length: int

    def heldout_blocks(self) -> torch.Tensor:
        """Held-out tokens [n, length]; what fills no block is left out."""
        tokens = encode(self.tokenizer, [self.heldout], self.tokenizer.token_to_id(END) or 0)
        rows = tokens[: len(tokens) // self.length * self.length].reshape(-1, self.length)
        return torch.from_numpy(rows.astype(np.int64))


def read(vocab: int, length: int, blocks: int, seed: int) -> Text:
    """`blocks` blocks of `length` tokens of the corpus, mixed as `thrifty train` mixes it."""
    corpus = builtin_corpus()
    texts = (text for part in corpus.parts for _ in range(part.vocabulary_weight) for text in part.documents)
    tokenizer = train_tokenizer(texts, vocab)
    end, most = tokenizer.token_to_id(END) or 0, blocks * length
    streams = {part.name: encode(tokenizer, part.documents, end, most) for part in corpus.parts}
    return Text(tokenizer, PackedBlocks(streams, corpus.mixture, length, blocks, seed), corpus.heldout, length)


def train(model: ThriftyForCausalLM, text: Text, batch: int, seed: int, watch: Callable[[int, float], None]) -> None:
    """Train on every block once, by the recipe of `thrifty train`.

    `watch` is called after each step with the steps done and the loss in nats a token.
    """
    steps = len(text.blocks) // batch
    recipe = find_recipe("demo").override(steps=steps, batch_size=batch, sequence_length=text.length, seed=seed)
    training = recipe.training
    torch.manual_seed(seed)
    initialize(model, training)
    optimizer = build_optimizer(model, training)
    schedule = Schedule(optimizer, steps, training)
    model.train()
    for step in range(steps):
        ids = torch.stack([text.blocks[step * batch + i]["input_ids"] for i in range(batch)])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        watch(step + 1, loss.item())


@torch.no_grad()
def heldout_loss(model: ThriftyForCausalLM, blocks: torch.Tensor, batch: int = 16) -> float:
    """Nats a token of held-out blocks [n, length]."""
    training = model.training
    model.eval()
    nats = 0.0
    for ids in blocks.split(batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    model.train(training)
    return nats / (len(blocks) * (blocks.shape[1] - 1))
