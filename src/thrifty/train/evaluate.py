"""How well a torch model knows a text, by the definition that the runtime has too."""

import math
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import PreTrainedModel

from thrifty.errors import ThriftyError
from thrifty.runtime.score import Score
from thrifty.spec.windows import scoring_windows

#: Tokens that go through the model together.
BATCH_TOKENS = 4096


def bits_per_byte(
    model: PreTrainedModel, tokenizer: Tokenizer, text: str, window: int | None = None, stride: int | None = None
) -> float:
    """Negative log2-likelihood of a text over its bytes in UTF-8, in windows as `score` has them."""
    return score(model, tokenizer, text, window, stride).bits_per_byte


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    text: str,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Negative log-likelihood of a text.

    Windows of `window` tokens (by default the model's positions) advance by `stride` (by default half a window), as in
    `thrifty.runtime.Runtime.score`; the first token is predicted from the beginning-of-sequence token, or the
    end-of-sequence token; a model that has neither pays log2(vocabulary). progress: called with the tokens scored so
    far and all of them.

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
    start = start_token(model)
    read = torch.tensor(ids if start is None else [start, *ids], device=next(model.parameters()).device)
    nats = math.log(model.config.vocab_size) if start is None else 0.0
    training = model.training
    model.eval()
    windows = list(scoring_windows(len(read), window, stride))
    try:
        for group in _alike(windows, max(1, BATCH_TOKENS // window)):
            inputs = torch.stack([read[begin : stop - 1] for begin, _, stop in group])
            targets = torch.stack([read[scored:stop] for _, scored, stop in group])
            logits = model(input_ids=inputs, use_cache=False).logits[:, -targets.shape[1] :]
            nats += F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
            if progress is not None:
                progress(group[-1][2] - (len(read) - len(ids)), len(ids))
    finally:
        model.train(training)
    return Score(nats, len(ids), len(text.encode()))


def start_token(model: PreTrainedModel) -> int | None:
    """The token that begins a sequence, as `thrifty.runtime.Runtime.start_token` has it."""
    found = {}
    for name in ("bos_token_id", "eos_token_id"):
        stored = getattr(model.generation_config, name, None)
        found[name] = getattr(model.config, name, None) if stored is None else stored
    bos, eos = found["bos_token_id"], found["eos_token_id"]
    if bos is not None and bos < model.config.vocab_size:
        return bos
    return min(eos if isinstance(eos, list) else [] if eos is None else [eos], default=None)


def _alike(windows: list[tuple[int, int, int]], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbouring windows of one size and one number of scored tokens, at most `most` together."""
    for _, members in groupby(windows, key=lambda w: (w[2] - w[0], w[2] - w[1])):
        members = list(members)
        yield from (members[i : i + most] for i in range(0, len(members), most))
