"""Multi-query associative recall: what a mixer remembers of pairs it read once.

    python examples/mqar.py [--mixers attention dynamic_mask ssd mlgru] [--windows 64] [--minutes 30] [--out runs/mqar]

Zoology's task (arXiv 2312.04927, section 4) with the sizes of Wonderful Matrices' figure (arXiv 2412.11834): a text is
--pairs pairs of a key and a value, then the same keys once more, each of which must be answered by its value. Keys come
back after gaps of a power law; between them is token 0. Every mixer gets the same decoder: two layers, one head, --dim
wide, no convolution. Training begins with --first pairs in texts as much shorter; both grow by --growth when 19 of 20
answers are right, or after a 24th of the time. A run stops when the share --enough of held-out answers is
right, or after --minutes of processor time; the table's share is of other texts. Writes a row of OUT/mqar.md and a
curve of OUT/mqar.png for each run; a run goes on from where it was stopped (--fresh: from nothing). Needs
`thrifty[train]`.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from thrifty.models import ThriftyConfig, ThriftyForCausalLM

MIXERS = ("attention", "dynamic_mask", "ssd", "mlgru")
#: Tokens of a batch.
BATCH_TOKENS = 4096


@dataclass
class Run:
    """A mixer in training. `curve`: pairs of seconds of processor time and the share of held-out answers right."""

    name: str
    model: ThriftyForCausalLM
    optimizer: torch.optim.Optimizer
    pairs: int
    step: int = 0
    seconds: float = 0.0
    #: When the texts last grew, and the running share of answers right since.
    grown: float = 0.0
    recent: float = 0.0
    finished: bool = False
    curve: list[tuple[float, float]] = field(default_factory=list)

    def save(self, file: Path) -> None:
        facts = {name: getattr(self, name) for name in FACTS}
        torch.save(facts | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)

    def load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        for name in FACTS:
            setattr(self, name, state[name])

    def grow(self, most: int, rate: float, seconds: float) -> None:
        """More pairs, by a share `rate`, where 19 of 20 answers are right, or after so many seconds."""
        if self.pairs < most and (self.recent > 0.95 or self.seconds - self.grown > seconds):
            self.pairs = min(self.pairs + max(1, int(rate * self.pairs)), most)
            self.grown, self.recent = self.seconds, 0.0


FACTS = ("pairs", "step", "seconds", "grown", "recent", "finished", "curve")


def texts(rows: int, tokens: int, pairs: int, vocab: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [rows, tokens], and the answers at the positions of the queries, -100 elsewhere."""
    keys = np.argsort(rng.random((rows, vocab // 2 - 1)))[:, :pairs] + 1
    values = np.argsort(rng.random((rows, vocab - vocab // 2)))[:, :pairs] + vocab // 2
    slots = np.arange(1, (tokens - 2 * pairs) // 2 + 1)
    # Zoology's law of gaps, p ~ slot^(0.01 - 1), drawn without replacement by Gumbel's trick.
    order = -0.99 * np.log(slots) + rng.gumbel(size=(rows, len(slots)))
    places = 2 * pairs + 2 * np.argsort(-order)[:, :pairs]
    ids, labels = np.zeros((rows, tokens), np.int64), np.full((rows, tokens), -100, np.int64)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(ids, places, keys, 1)
    np.put_along_axis(labels, places, values, 1)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def build(mixer: str, window: int, args: argparse.Namespace) -> ThriftyForCausalLM:
    config = ThriftyConfig(
        vocab_size=args.vocab,
        hidden_size=args.dim,
        intermediate_size=2 * args.dim,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=args.tokens,
        token_mixers=mixer,
        keep_window_size=window,
        linear="dense",
        norm_placement="pre",
        tie_word_embeddings=False,
        attention_bias=True,
        # Short waves, as texts are: the token before is easily told from the others.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        ssd_chunk_size=64,
    )
    model = ThriftyForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "lm_head" not in name:
            # Embeddings as large as what the layers add to them: a key must still be known where it is compared.
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    return model


def answers(model: ThriftyForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the queries, and the right answers."""
    asked = labels != -100
    return model.lm_head(model.model(ids, use_cache=False).last_hidden_state[asked]), labels[asked]


@torch.no_grad()
def accuracy(model: ThriftyForCausalLM, args: argparse.Namespace, seed: int, rows: int) -> float:
    rng = np.random.default_rng([seed, args.seed])
    model.eval()
    right = []
    for _ in range(rows // 16):
        logits, wanted = answers(model, *texts(16, args.tokens, args.pairs, args.vocab, rng))
        right.append((logits.argmax(-1) == wanted).float().mean().item())
    model.train()
    return sum(right) / len(right)


def train(run: Run, args: argparse.Namespace, file: Path) -> None:
    """Train to the end of the time, or until held-out texts are answered."""
    last = run.seconds
    while not run.finished:
        started = time.process_time()
        tokens = run.pairs * args.tokens // args.pairs
        rows = min(max(BATCH_TOKENS // tokens, 16), 128)
        ids, labels = texts(rows, tokens, run.pairs, args.vocab, np.random.default_rng([1, args.seed, run.step]))
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (run.step + 1) / 50)
        logits, wanted = answers(run.model, ids, labels)
        loss = F.cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        run.recent += 0.1 * ((logits.argmax(-1) == wanted).float().mean().item() - run.recent)
        run.seconds += time.process_time() - started
        run.grow(args.pairs, args.growth, 60 * args.minutes / 24)
        if run.seconds - last >= args.look or run.seconds >= 60 * args.minutes:
            last = run.seconds
            share = accuracy(run.model, args, 2, 64)
            run.curve.append((run.seconds, share))
            run.finished = share >= args.enough or run.seconds >= 60 * args.minutes
            run.save(file)
            print(
                f"{run.name}: step {run.step}, {run.seconds / 60:.1f} min, {run.pairs} pairs in {tokens} tokens: "
                f"loss {loss.item():.3f}, {run.recent:.3f} right; {share:.3f} of {args.pairs} pairs",
                flush=True,
            )


def measure(mixer: str, window: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one mixer, or take it up, and score it on texts that neither training nor stopping saw."""
    torch.manual_seed(args.seed)
    name = f"{mixer}, w = {window}" if mixer == "dynamic_mask" else mixer
    model = build(mixer, window, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    run = Run(name, model, optimizer, min(args.first, args.pairs))
    file = args.out / f"{mixer}-{window if mixer == 'dynamic_mask' else ''}{args.pairs}x{args.tokens}-{args.seed}.pt"
    if file.exists() and not args.fresh:
        run.load(file)
    train(run, args, file)
    return {
        "mixer": name,
        "right": accuracy(model, args, 3, args.test),
        "minutes": run.seconds / 60,
        "steps": run.step,
        "parameters": model.num_parameters(),
        "curve": run.curve,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| mixer | right | minutes | steps | parameters |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['mixer']} | {row['right']:.3f} | {row['minutes']:.1f} | {row['steps']} | {row['parameters']} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        minutes = [seconds / 60 for seconds, _ in row["curve"]]
        axes.plot(minutes, [right for _, right in row["curve"]], marker=".", label=row["mixer"])
    axes.set(xlabel="minutes of one processor", ylabel="answers right", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--windows", type=int, nargs="+", help="keys that dynamic_mask keeps; default: --pairs")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=64, help="at most a quarter of --tokens")
    parser.add_argument("--vocab", type=int, default=257, help="half of them keys, half values")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--first", type=int, default=4, help="pairs of the first texts")
    parser.add_argument("--growth", type=float, default=0.25)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, default=30, help="most minutes of processor time for each run")
    parser.add_argument("--enough", type=float, default=0.998)
    parser.add_argument("--look", type=float, default=10, help="seconds between looks at held-out texts")
    parser.add_argument("--test", type=int, default=512, help="texts of the final score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/mqar"))
    args = parser.parse_args()
    if not 4 <= 4 * args.pairs <= args.tokens or args.pairs >= args.vocab // 2:
        parser.error("--pairs must be at most a quarter of --tokens, and less than half of --vocab")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for mixer in args.mixers:
        for window in (args.windows or [args.pairs]) if mixer == "dynamic_mask" else [args.pairs]:
            rows.append(measure(mixer, window, args))
            args.out.joinpath("mqar.json").write_text(json.dumps(rows))
            args.out.joinpath("mqar.md").write_text(table(rows))
            title = f"{args.pairs} pairs in {args.tokens} tokens, width {args.dim}"
            draw(rows, title, args.out / "mqar.png")
    print(table(rows))


if __name__ == "__main__":
    main()
