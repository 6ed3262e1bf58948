"""The blocks that a run trains on and glances at, from a corpus and a tokenizer."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from thrifty.train.blocks import PackedBlocks
from thrifty.train.corpus import Corpus
from thrifty.train.process import rank, sequences_at_once, world_size
from thrifty.train.recipe import Training
from thrifty.train.stream import StreamedBlocks

#: Held-out sequences looked at while training; the whole held-out text is scored at the end.
GLANCE = 16
#: Documents that the tokenizer gets at once.
ENCODED_TOGETHER = 32


def training_blocks(
    corpus: Corpus, training: Training, tokenizer: Tokenizer, begin: int
) -> tuple[PackedBlocks | StreamedBlocks, PackedBlocks | None, float]:
    """Training blocks, held-out blocks, and the factor from nats per held-out token to bits per byte."""
    length, count = training.sequence_length, training.steps * training.batch_size
    border = begin if training.document_mask else None
    if corpus.stream is None:
        blocks = _packed(corpus, training, tokenizer, begin, border)
    else:
        stream = corpus.stream
        blocks = StreamedBlocks(
            *(stream.sources, stream.weights, stream.heldout, partial(encoded, tokenizer, begin)),
            *(length, count, training.seed),
            batch=sequences_at_once(training.batch_size, training.accumulate),
            rank=rank(),
            world=world_size(),
            begin=border,
        )
    heldout = encode(tokenizer, [corpus.heldout], begin)
    pieces = min(GLANCE, len(heldout) // length)
    mixture = ((0.0, {"heldout": 1.0}),)
    glance = PackedBlocks({"heldout": heldout}, mixture, length, pieces, 0, border) if pieces else None
    scale = len(heldout) / (max(len(corpus.heldout.encode()), 1) * math.log(2))
    return blocks, glance, scale


def _packed(corpus: Corpus, training: Training, tokenizer: Tokenizer, begin: int, border: int | None) -> PackedBlocks:
    mixture = corpus.mixture or ((0.0, {part.name: float(part.size) for part in corpus.parts}),)
    length, count = training.sequence_length, training.steps * training.batch_size
    streams = {}
    for part in corpus.parts:
        share = max(shares.get(part.name, 0.0) / sum(shares.values()) for _, shares in mixture)
        order = np.random.default_rng(training.seed).permutation(len(part.documents))
        documents = [part.documents[i] for i in order]
        streams[part.name] = encode(tokenizer, documents, begin, most=int(share * count * length))
    return PackedBlocks(streams, mixture, length, count, training.seed, border)


def encode(tokenizer: Tokenizer, documents: Sequence[str], begin: int, most: int | None = None) -> np.ndarray:
    """The documents' tokens in one stream, int32, the token `begin` before each document.

    Documents after the one that reaches `most` tokens are left out: a run that reads no more need not wait for them.
    """
    stream = [np.empty(0, np.int32)]
    size = 0
    for first in range(0, len(documents), ENCODED_TOGETHER):
        if most is not None and size >= most:
            break
        together = encoded(tokenizer, begin, documents[first : first + ENCODED_TOGETHER])
        stream += together
        size += sum(map(len, together))
    return np.concatenate(stream)


def encoded(tokenizer: Tokenizer, begin: int, documents: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each document, int32, after the token `begin`."""
    found = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    return [np.array([begin, *encoding.ids], np.int32) for encoding in found]
