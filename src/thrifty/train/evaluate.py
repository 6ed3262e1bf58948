"""How well a torch model knows a text, by the definition that the runtime has too."""

import math
from collections.abc import Iterator
from itertools import groupby

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import PreTrainedModel

from thrifty.errors import ThriftyError
from thrifty.spec.windows import scoring_windows

#: Tokens that go through the model together.
BATCH_TOKENS = 4096


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: Tokenizer, text: str, window: int | None = None, stride: int | None = None
) -> float:
    """Negative log2-likelihood of a text over its bytes in UTF-8.

    Windows of `window` tokens (by default the model's positions) advance by `stride` (by default half a window), as in
    `thrifty.runtime.Runtime.bits_per_byte`; the first token is predicted from the beginning-of-sequence token.

    Errors: a text without a token, a window that the model has no positions for.
    """
    limit = int(model.config.max_position_embeddings)
    window = limit if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window <= limit:
        rule = f"[evaluate] 1 <= stride <= window <= {limit} (the positions) must hold"
        raise ThriftyError(f"{rule}; got stride {stride} and window {window}")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ThriftyError("[evaluate] the text must have at least one token; got none; give a text")
    device = next(model.parameters()).device
    read = torch.tensor([model.config.bos_token_id, *ids], device=device)
    training = model.training
    model.eval()
    nats = 0.0
    windows = list(scoring_windows(len(read), window, stride))
    try:
        for group in _alike(windows, max(1, BATCH_TOKENS // window)):
            inputs = torch.stack([read[begin : stop - 1] for begin, _, stop in group])
            targets = torch.stack([read[scored:stop] for _, scored, stop in group])
            logits = model(input_ids=inputs, use_cache=False).logits[:, -targets.shape[1] :]
            nats += F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
    finally:
        model.train(training)
    return nats / math.log(2) / len(text.encode())


def _alike(windows: list[tuple[int, int, int]], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbouring windows of one size and one number of scored tokens, at most `most` together."""
    for _, members in groupby(windows, key=lambda w: (w[2] - w[0], w[2] - w[1])):
        members = list(members)
        yield from (members[i : i + most] for i in range(0, len(members), most))
