"""A BERT made ternary by one call: trained on a small task, packed, and compared.

    python examples/bert_ternary.py [--steps 600] [--dense] [--out runs/bert_ternary]

The task: from which package of Python's standard library does a passage of documentation come? The packages are the
--labels with the most prose, every fifth passage is held out. The model is transformers'
`BertForSequenceClassification` with random weights, whose linear layers `thrifty.nn.replace_linears_in_hf` makes
ternary in place; nothing is downloaded. After training `pack` makes the small copy, which predicts the same. OUT.md
gets the accuracies and the bytes. --dense trains the model as it was, too, by the same recipe. Needs `thrifty[train]`.
"""

import argparse
import copy
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from thrifty.nn import pack, replace_linears_in_hf
from thrifty.train.corpus import stdlib_files
from thrifty.train.prose import prose
from thrifty.train.tokenizer import train_tokenizer

#: Ids in front of the tokenizer's: padding and [CLS].
PAD, CLS, FIRST = 0, 1, 2
#: What the packed model is asked in the end.
QUESTION = "await the event loop until the future is done"


@dataclass
class Task:
    """Passages [n, length] and the numbers of their labels, to train on and held out."""

    labels: list[str]
    tokenizer: Tokenizer
    train: tuple[Tensor, Tensor]
    heldout: tuple[Tensor, Tensor]


def read(labels: int, vocab: int, length: int) -> Task:
    """Passages of the packages that have the most prose."""
    texts: dict[str, str] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in stdlib_files():
        parts = file.relative_to(root).parts
        if len(parts) > 1:
            texts[parts[0]] = texts.get(parts[0], "") + prose(file.read_text(encoding="utf-8", errors="ignore"))
    names = sorted(texts, key=lambda name: -len(texts[name]))[:labels]
    tokenizer = train_tokenizer([texts[name] for name in names], vocab)
    passages, kinds = [], []
    for kind, name in enumerate(names):
        ids = torch.tensor(tokenizer.encode(texts[name], add_special_tokens=False).ids) + FIRST
        rows = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
        passages.append(F.pad(rows, (1, 0), value=CLS))
        kinds.append(torch.full((len(rows),), kind))
    x, y = torch.cat(passages), torch.cat(kinds)
    out = torch.arange(len(x)) % 5 == 4
    return Task(names, tokenizer, (x[~out], y[~out]), (x[out], y[out]))


def train(model: BertForSequenceClassification, task: Task, steps: int, batch: int, rate: float, seed: int) -> None:
    """AdamW, a warm-up and a decay to zero; labels are drawn equally often."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / (steps / 10), (steps - i) / steps))
    x, y = task.train
    shares = 1 / y.bincount().float()[y]
    model.train()
    for step in range(1, steps + 1):
        rows = torch.multinomial(shares, batch)
        loss = model(x[rows], labels=y[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(rows).logits for rows in x.split(64)])


def accuracy(found: Tensor, y: Tensor) -> float:
    """The mean over labels of the share that is right, so that a frequent label counts no more."""
    right = (found.argmax(-1) == y).float()
    return torch.stack([right[y == kind].mean() for kind in y.unique()]).mean().item()


def nbytes(model: torch.nn.Module) -> int:
    """Bytes of a state dict, as a file would hold it."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--length", type=int, default=64, help="tokens of a passage")
    parser.add_argument("--labels", type=int, default=6, help="packages to tell apart")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="train the dense model too")
    parser.add_argument("--out", type=Path, default=Path("runs/bert_ternary"))
    args = parser.parse_args()
    task = read(args.labels, args.vocab, args.length)
    print(f"{len(task.train[0])} passages of {', '.join(task.labels)}; {len(task.heldout[0])} held out")
    torch.manual_seed(args.seed)
    config: Any = BertConfig(
        vocab_size=args.vocab + FIRST,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=args.length,
        pad_token_id=PAD,
    )
    config.num_labels = len(task.labels)
    model = BertForSequenceClassification(config)
    dense = copy.deepcopy(model)
    recipe = (args.steps, args.batch, args.rate, args.seed)
    x, y = task.heldout
    lines = ["| | accuracy, held out | MB | seconds of training |", "| --- | ---: | ---: | ---: |"]

    def add(name: str, found: Tensor, tried: torch.nn.Module, seconds: float | None = None) -> None:
        time_taken = "" if seconds is None else f"{seconds:.0f}"
        lines.append(f"| {name} | {accuracy(found, y):.1%} | {nbytes(tried) / 1e6:.2f} | {time_taken} |")

    if args.dense:
        start = time.perf_counter()
        train(dense, task, *recipe)
        add("dense", logits(dense, x), dense, time.perf_counter() - start)

    print(replace_linears_in_hf(model))
    add("ternary, untrained", logits(model.eval(), x), model)
    start = time.perf_counter()
    train(model, task, *recipe)
    latent = logits(model, x)
    add("ternary, latent weights", latent, model, time.perf_counter() - start)

    small = pack(model)
    packed = logits(small, x)
    add("ternary, packed", packed, small)
    same = "the same bits" if torch.equal(packed, latent) else "NOT the same bits"
    lines.append(f"\nLogits of the packed model: {same} as of the latent one.")

    ids = torch.tensor([CLS, *(i + FIRST for i in task.tokenizer.encode(QUESTION).ids)][: args.length])
    with torch.no_grad():
        predictions = F.softmax(small(ids[None]).logits, dim=-1)
    lines.append(f'"{QUESTION}": {task.labels[int(predictions.argmax())]}')

    text = "\n".join(lines) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
