"""How well a model knows a text."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a text, in nats."""

    nats: float
    tokens: int
    #: Of the text in UTF-8.
    nbytes: int

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens)."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: it does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.nbytes


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum of -log softmax(logits)[target], in float64."""
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return float((log_sum - logits[np.arange(len(targets)), targets]).sum())
