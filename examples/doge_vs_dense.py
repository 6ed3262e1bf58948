"""Doge beside a dense decoder on real text: held-out loss at equal parameters and at equal arithmetic.

    python examples/doge_vs_dense.py [--steps 120] [--experts 1024] [--out runs/doge_vs_dense]

Five models read the same blocks of the built-in corpus of `thrifty train`, in the same order, by the same recipe:
"dense" (attention and a gated MLP); "Doge, all keys" (dynamic mask attention that drops no key, and Doge's residuals);
"Doge" (which keeps --window keys); "Doge, experts" (product-key experts, and an MLP so much smaller that the arithmetic
is that of Doge); "dense, wide" (an MLP so wide that the parameters are as many as with the experts). Writes OUT.md and
OUT.png. Needs `thrifty[train]`.
"""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _language import Text, heldout_loss, read, train

from thrifty.models import DogeConfig, ThriftyConfig, ThriftyForCausalLM


@dataclass
class Row:
    """A trained model; loss in nats a token by training steps, arithmetic in multiply-adds a token."""

    name: str
    parameters: int
    arithmetic: float
    curve: list[tuple[int, float]] = field(default_factory=list)


def common(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "vocab_size": args.vocab,
        "hidden_size": args.dim,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads // 2,
        "max_position_embeddings": args.length,
        "tie_word_embeddings": True,
    }


def configs(args: argparse.Namespace) -> dict[str, ThriftyConfig]:
    """Models by name; the widths of their MLPs follow from `--mlp`, that of Doge."""
    shape, mlp, keys = common(args), args.mlp, math.isqrt(args.experts)
    # A unit of the MLP is three rows of weights, of an expert two; the router has one row for each key.
    narrow = mlp - round((2 * args.chosen + 2 * keys) / 3)
    wide = narrow + round((2 * args.experts + 2 * keys) / 3)
    doge: dict[str, Any] = {"keep_window_size": args.window, **shape}
    experts: dict[str, Any] = {"num_experts": args.experts, "num_experts_per_tok": args.chosen, "is_moe": True}
    dense: dict[str, Any] = {"linear": "dense", "norm_placement": "pre", "rms_norm_eps": 1e-6, **shape}
    return {
        "dense": ThriftyConfig(intermediate_size=mlp, **dense),
        "Doge, all keys": DogeConfig(intermediate_size=mlp, dynamic_mask_selection="none", **shape),
        "Doge": DogeConfig(intermediate_size=mlp, **doge),
        "Doge, experts": DogeConfig(intermediate_size=narrow, **experts, **doge),
        "dense, wide": ThriftyConfig(intermediate_size=wide, **dense),
    }


def arithmetic(model: ThriftyForCausalLM, length: int) -> float:
    """Multiply-adds a token of a forward pass over `length` tokens: weights that meet it, and the keys it sees."""
    config = model.config
    weights = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 2}
    total = float(sum(size for name, size in weights.items() if "_embed" not in name and "embed_" not in name))
    if config.tie_word_embeddings:
        total += config.vocab_size * config.hidden_size
    if config.feed_forward == "cdmoe":
        total += config.num_hidden_layers * 2 * config.num_experts_per_tok * config.hidden_size
    dynamic = "dynamic_mask" in config.mixers and config.dynamic_mask_selection == "keep_window"
    most = config.keep_window_size if dynamic else length
    keys = sum(min(i + 1, most) for i in range(length)) / length
    return total + config.num_hidden_layers * 2 * keys * config.num_attention_heads * (config.head_dim or 0)


def measure(name: str, config: ThriftyConfig, text: Text, args: argparse.Namespace) -> Row:
    model = ThriftyForCausalLM(config)
    row = Row(name, model.num_parameters(), arithmetic(model, args.length))
    heldout = text.heldout_blocks()

    def watch(step: int, loss: float) -> None:
        if step % args.look == 0 or step == args.steps:
            row.curve.append((step, heldout_loss(model, heldout)))
            print(f"{name}: step {step}, loss {loss:.3f}, held out {row.curve[-1][1]:.4f}", flush=True)

    train(model, text, args.batch, args.seed, watch)
    return row


def table(rows: list[Row]) -> str:
    lines = ["| model | parameters | multiply-adds a token | held out, nats a token |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for row in rows:
        sizes = f"{row.parameters / 1e6:.2f} M | {row.arithmetic / 1e6:.2f} M"
        lines.append(f"| {row.name} | {sizes} | {row.curve[-1][1]:.3f} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_step, by_size, by_work = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    for row in rows:
        by_step.plot(*zip(*row.curve, strict=True), marker=".", label=row.name)
        loss = row.curve[-1][1]
        by_size.plot(row.parameters / 1e6, loss, "o")
        by_work.plot(row.arithmetic / 1e6, loss, "o")
    by_step.set(xlabel="step", ylabel="held-out loss (nats a token)")
    by_size.set(xlabel="parameters (millions)", title="at the end")
    by_work.set(xlabel="multiply-adds a token (millions)", title="at the end")
    by_step.legend()
    for axes in (by_step, by_size, by_work):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="blocks of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--window", type=int, default=64, help="keys that Doge keeps")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4, help="half as many kv heads")
    parser.add_argument("--mlp", type=int, default=384, help="units of Doge's MLP")
    parser.add_argument("--experts", type=int, default=1024, help="a square")
    parser.add_argument("--chosen", type=int, default=16, help="experts of a token")
    parser.add_argument("--look", type=int, default=30, help="steps between looks at the held-out text")
    parser.add_argument("--only", nargs="+", help="models by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/doge_vs_dense"))
    args = parser.parse_args()
    text = read(args.vocab, args.length, args.steps * args.batch, args.seed)
    models = configs(args)
    rows = [measure(name, models[name], text, args) for name in args.only or models]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(table(rows))
    draw(rows, args.out.with_suffix(".png"))
    print(f"\n{table(rows)}\nwrote {args.out.with_suffix('.md')} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
