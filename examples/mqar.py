"""Multi-query associative recall: what a mixer remembers of pairs it read once.

    python examples/mqar.py                                            # every mixer, a sweep over w: table and picture
    python examples/mqar.py --mixers dynamic_mask --windows 64 --exact # one run of them
    python examples/mqar.py --short                                    # the same with sizes of seconds

Zoology's task (arXiv 2312.04927, section 4) with the sizes of Wonderful Matrices' figure (arXiv 2412.11834): a text is
--pairs pairs of a key and a value, then the same keys once more, each of which must be answered by its value. Keys come
back after gaps of a power law; between them is token 0. Every mixer gets the same decoder: two layers, one head, --dim
wide, no convolution. A dynamic mask keeps w keys in each layer, of --tokens.

Training begins with --first pairs in texts as much shorter; they double when 19 of 20 answers are right, or after a
12th of the time. A dynamic mask is soft in training (`SoftMask`), and hardens once the texts are long and 9 of 10
answers right, except at the w of --exact; looks and scores are always the library's exact mask. A run stops when the
share --enough of held-out answers is right, or after --minutes of processor time; the table's share is of other texts.
Writes OUT/mqar.json, .md and .png; a run goes on from where it was stopped, and what is finished is only scored
(--fresh: from nothing). Needs `thrifty[train]`.
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

from thrifty import ops
from thrifty.models import ThriftyConfig, ThriftyForCausalLM
from thrifty.nn import DynamicMaskAttention

#: Mixers, and the learning rate that each was found to learn most with.
MIXERS = {"attention": 2e-3, "dynamic_mask": 2e-3, "ssd": 5e-3, "mlgru": 5e-3}
#: Tokens of a batch.
BATCH_TOKENS = 4096
#: The least softness while the learning rate is level; it falls with it. Harder, and lost keys have no gradient again.
HARD = 0.01


class SoftMask(DynamicMaskAttention):
    """`DynamicMaskAttention` of one head with a mask that is soft in training: lost keys get a gradient.

    A key of rank r_j = log b_j gets log sigmoid((r_j - theta_t) / (softness * spread)) added to its logit at query t,
    where theta_t lies between the worst key kept and the best one lost, and spread is the deviation of a text's ranks:
    without it the scores would shrink until nothing is lost. Dense: for short texts only.
    """

    softness = 1.0

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        if not self.training or rotary is None:
            return super().forward(x, rotary, mask, past_key_values)
        v = self.v_proj(x)  # [B, T, d]
        q, k = (ops.apply_rope(project(x)[:, :, None], *rotary)[:, :, 0] for project in (self.q_proj, self.k_proj))
        b = ops.key_scores(v[:, None], self.A, self.dt_proj.weight, self.dt_proj.bias)  # [B, 1, T]
        logits = q @ k.transpose(1, 2) * self.head_dim**-0.5 + b + self.loss_of_weight(b)
        return self.o_proj(torch.softmax(logits, -1) @ v)

    def loss_of_weight(self, b: Tensor) -> Tensor:
        """What is added to the logits of key j at query t: [B, 1, T] to [B, T, T], -inf at keys to come."""
        rank, at = b.log(), torch.arange(b.shape[2])
        future = at > at[:, None]
        with torch.no_grad():
            kept = (at[:, None] < ops.kept_until(b, self.window or len(at)).transpose(1, 2).mT) & ~future
            worst = rank.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
            lost = rank.masked_fill(kept | future, -torch.inf).amax(-1, keepdim=True)
            theta, spread = (worst + lost) / 2, rank.std(-1, keepdim=True).clamp(min=1e-4)
        return F.logsigmoid((rank - theta) / (self.softness * spread)).masked_fill(future, -torch.inf)


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
    softness: float = 1.0
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

    def harder(self, fall: float, args: argparse.Namespace) -> None:
        """Twice the pairs where 19 of 20 answers are right, or after too long; with all of them, a harder mask."""
        if self.pairs == args.pairs:
            self.softness = max(self.softness * (0.99 if self.recent > 0.9 else 1.0), HARD * fall)
        elif self.recent > 0.95 or self.seconds - self.grown > 60 * args.minutes / 12:
            self.pairs, self.grown, self.recent = min(2 * self.pairs, args.pairs), self.seconds, 0.0


FACTS = ("pairs", "step", "seconds", "grown", "recent", "softness", "finished", "curve")


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


def build(mixer: str, window: int, exact: bool, args: argparse.Namespace) -> ThriftyForCausalLM:
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
        # A sum over the text needs a norm that a mean over it does not.
        norm_placement="sub_ln" if mixer in ("ssd", "mlgru") else "pre",
        tie_word_embeddings=False,
        attention_bias=True,
        # Short waves, as texts are: the token before is easily told from the others.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        ssd_chunk_size=64,
    )
    model = ThriftyForCausalLM(config)
    if mixer == "dynamic_mask" and not exact:
        for number, layer in enumerate(model.model.layers):
            layer.self_attn = SoftMask(args.dim, heads=1, window=window, bias=True, layer_idx=number)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "lm_head" not in name:
            # Embeddings as large as what the layers add to them: a key must still be known where it is compared.
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
        elif name.endswith(".A") and not exact:
            # At A = 0 all ranks are equal whatever dt_proj is, and where A passes 0 their order turns around.
            torch.nn.init.constant_(parameter, 0.1).requires_grad_(False)
        elif name.endswith("A_log"):
            # The first layer remembers a token or two, the second a text.
            torch.nn.init.constant_(parameter, 0.0 if "layers.0." in name else -4.0)
        elif mixer == "ssd" and name.endswith(("b_proj.bias", "c_proj.bias")):
            # Rotary turns constant B and C into a weight of distance; from zeros, that product has no gradient.
            torch.nn.init.ones_(parameter)
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


def train(run: Run, lr: float, args: argparse.Namespace, file: Path) -> None:
    """Train to the end of the time, or until held-out texts are answered."""
    most, last = 60 * args.minutes, run.seconds
    while not run.finished:
        started = time.process_time()
        tokens = run.pairs * args.tokens // args.pairs
        rows = min(max(BATCH_TOKENS // tokens, 16), 128)
        ids, labels = texts(rows, tokens, run.pairs, args.vocab, np.random.default_rng([1, args.seed, run.step]))
        fall = min(1.0, max(2 - 2 * run.seconds / most, 0.02))  # in the second half of the time
        for group in run.optimizer.param_groups:
            group["lr"] = lr * min(fall, (run.step + 1) / 50)
        for module in run.model.modules():
            if isinstance(module, SoftMask):
                module.softness = run.softness
        logits, wanted = answers(run.model, ids, labels)
        loss = F.cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        run.recent += 0.1 * ((logits.argmax(-1) == wanted).float().mean().item() - run.recent)
        run.seconds += time.process_time() - started
        run.harder(fall, args)
        if run.seconds - last >= args.look or run.seconds >= most:
            last = run.seconds
            share = accuracy(run.model, args, 2, 64)
            run.curve.append((run.seconds, share))
            run.finished = share >= args.enough or run.seconds >= most
            run.save(file)
            print(
                f"{run.name}: step {run.step}, {run.seconds / 60:.1f} min, {run.pairs} pairs in {tokens} tokens: "
                f"loss {loss.item():.3f}, {run.recent:.3f} right, mask {run.softness:.4f} soft; "
                f"{share:.3f} of {args.pairs} pairs",
                flush=True,
            )


def measure(mixer: str, window: int, exact: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Train one mixer, or take it up, and score it on texts that neither training nor stopping saw."""
    torch.manual_seed(args.seed)
    name = f"{mixer}, w = {window}" if mixer == "dynamic_mask" else mixer
    if exact:
        name += ", exact"
    model, lr = build(mixer, window, exact, args), args.lr or MIXERS[mixer]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    run = Run(name, model, optimizer, min(args.first, args.pairs))
    file = args.out / f"{name.replace(', ', '-').replace(' = ', '')}-{args.pairs}x{args.tokens}-{args.seed}.pt"
    if file.exists() and not args.fresh:
        run.load(file)
    train(run, lr, args, file)
    return {
        "name": name,
        "mixer": mixer,
        "window": window,
        "exact": exact,
        "right": accuracy(model, args, 3, args.test),
        "kept": kept(mixer, window, args),
        "minutes": run.seconds / 60,
        "steps": run.step,
        "curve": run.curve,
    }


def kept(mixer: str, window: int, args: argparse.Namespace) -> int:
    """Floats that a layer carries to the next token at the end of a text."""
    key_and_value = 2 * args.dim
    return {
        "attention": args.tokens * key_and_value,
        "dynamic_mask": window * (key_and_value + 1),
        "ssd": args.dim * args.dim,
        "mlgru": args.dim,
    }[mixer]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| mixer | right | floats kept | minutes | steps |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(f"| {row['name']} | {row['right']:.3f} | {row['kept']} | {row['minutes']:.1f} | {row['steps']} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Shares of answers right: each mixer (the dynamic mask at its least w), and the dynamic mask over w."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    bars, sweep = figure.subplots(1, 2, sharey=True)
    soft = {row["window"]: row["right"] for row in rows if row["mixer"] == "dynamic_mask" and not row["exact"]}
    exact = {row["window"]: row["right"] for row in rows if row["mixer"] == "dynamic_mask" and row["exact"]}
    shown = [row for row in rows if row["mixer"] != "dynamic_mask" or row["window"] == min(soft, default=0)]
    drawn = bars.bar([row["name"].replace(", ", "\n") for row in shown], [row["right"] for row in shown])
    bars.bar_label(drawn, fmt="%.3f")
    for found, label in ((soft, "trained with the soft mask"), (exact, "trained with the exact mask")):
        if found:
            sweep.plot(sorted(found), [found[window] for window in sorted(found)], marker="o", label=label)
            sweep.legend(loc="center right")
    bars.set(ylabel="answers right", ylim=(0, 1.08))
    bars.tick_params(axis="x", labelsize=8)
    sweep.set(xlabel="w, keys kept by the dynamic mask", xticks=sorted(soft | exact))
    sweep.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


#: Sizes of seconds, to see that it runs.
SHORT = {"tokens": 16, "pairs": 4, "vocab": 17, "windows": [4, 8], "exact": [4], "look": 1, "minutes": 0.01, "test": 16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument("--windows", type=int, nargs="*", default=[64, 96, 128, 192, 256], help="w of dynamic_mask")
    parser.add_argument(
        "--exact", type=int, nargs="*", default=[64, 128], help="w to train with the exact mask as well"
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=64, help="at most a quarter of --tokens")
    parser.add_argument("--vocab", type=int, default=257, help="half of them keys, half values")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--first", type=int, default=4, help="pairs of the first texts")
    parser.add_argument("--lr", type=float, help="default: one for each mixer")
    parser.add_argument("--minutes", type=float, default=6, help="most minutes of processor time for each run")
    parser.add_argument("--enough", type=float, default=0.995)
    parser.add_argument("--look", type=float, default=10, help="seconds between looks at held-out texts")
    parser.add_argument("--test", type=int, default=512, help="texts of the final score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="take up no run")
    parser.add_argument("--short", action="store_true", help="seconds: see that it runs, learn nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/mqar"))
    if parser.parse_args().short:
        parser.set_defaults(**SHORT)
    args = parser.parse_args()
    if not 4 <= 4 * args.pairs <= args.tokens or args.pairs >= args.vocab // 2:
        parser.error("--pairs must be at most a quarter of --tokens, and less than half of --vocab")
    return args


def main() -> None:
    args = arguments()
    torch.set_flush_denormal(True)  # weights of lost keys, with which products take many times as long
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for mixer in args.mixers:
        masks = [(w, False) for w in args.windows] + [(w, True) for w in args.exact]
        for window, exact in masks if mixer == "dynamic_mask" else [(args.tokens, False)]:
            rows.append(measure(mixer, window, exact, args))
            args.out.joinpath("mqar.json").write_text(json.dumps(rows))
            args.out.joinpath("mqar.md").write_text(table(rows))
            draw(rows, f"{args.pairs} pairs in {args.tokens} tokens, width {args.dim}", args.out / "mqar.png")
    print(table(rows))


if __name__ == "__main__":
    main()
