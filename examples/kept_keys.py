"""Which keys a trained Doge keeps: per layer and head, for each query of a text.

    python examples/kept_keys.py [--model FOLDER] [--text "..."] [--out runs/kept_keys]

A key's score does not depend on the query, so a key is kept from its own position to the first query at which --window
better keys precede it (`thrifty.ops.kept_until`): a column of a panel, dark while the key is kept. A diagonal band is a
sliding window; a long column a token that the head holds on to. Beside the picture OUT.png, OUT.md lists the tokens
that each head keeps to the end, and how long a key lives. Without --model, a small Doge is first trained on the
built-in corpus for --steps steps (minutes). Needs `thrifty[train]`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from _language import read, train
from tokenizers import Tokenizer
from torch import Tensor, nn

from thrifty import ops
from thrifty.models import DogeConfig, DogeForCausalLM, ThriftyForCausalLM
from thrifty.nn import DynamicMaskAttention

TEXT = (
    'The "for" statement is used to iterate over the elements of a sequence (such as a string, tuple or list) or other '
    "iterable object. The expression list is evaluated once; it should yield an iterable object. An iterator is "
    "created for that iterable. The first item provided by the iterator is then assigned to the target list, and the "
    "suite is executed. This repeats for each item provided by the iterator."
)


@dataclass
class Head:
    """A score head: the query position at which each key is dropped, the number of tokens where it never is."""

    name: str
    until: Tensor

    def lives(self) -> Tensor:
        """How many queries see each key."""
        return self.until - torch.arange(len(self.until))

    def seen(self) -> Tensor:
        """Whether query i sees key j, [i, j]."""
        positions = torch.arange(len(self.until))
        return (positions[:, None] >= positions) & (positions[:, None] < self.until)


@torch.no_grad()
def heads(model: ThriftyForCausalLM, ids: list[int], window: int | None) -> list[Head]:
    """The heads of all dynamic masks, by the scores that they give the tokens of a text."""
    inputs: dict[nn.Module, Tensor] = {}

    def keep(mixer: nn.Module, given: tuple) -> None:
        inputs[mixer] = given[0]

    mixers = [m for m in model.modules() if isinstance(m, DynamicMaskAttention)]
    hooks = [mixer.register_forward_pre_hook(keep) for mixer in mixers]
    model.eval()(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    for mixer in mixers:
        v = mixer.v_proj(inputs[mixer]).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
        scores = ops.key_scores(v, mixer.A, mixer.dt_proj.weight, mixer.dt_proj.bias)
        until = ops.kept_until(scores, window or mixer.window or len(ids))[0]
        found += [Head(f"layer {mixer.layer_idx}, head {h}", row) for h, row in enumerate(until)]
    return found


def trained(args: argparse.Namespace) -> tuple[ThriftyForCausalLM, Tokenizer]:
    """A small Doge of the built-in corpus."""
    text = read(1024, args.length, args.steps * args.batch, 0)
    config = DogeConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.length,
        keep_window_size=args.window,
        tie_word_embeddings=True,
    )
    model = DogeForCausalLM(config)

    def watch(step: int, loss: float) -> None:
        if step % 20 == 0 or step == args.steps:
            print(f"step {step} of {args.steps}, loss {loss:.3f}", flush=True)

    train(model, text, args.batch, 0, watch)
    return model, text.tokenizer


def draw(found: list[Head], tokens: list[str], columns: int, file: Path) -> None:
    from matplotlib.figure import Figure

    rows = -(-len(found) // columns)
    size = 5 if len(tokens) <= 160 else 8
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    for axes, head in zip(figure.subplots(rows, columns, squeeze=False).flat, found, strict=False):
        axes.imshow(head.seen(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        axes.set_title(head.name, fontsize=9)
        axes.set(xlabel="key", ylabel="query")
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=4)
        axes.tick_params(axis="y", labelsize=6)
    figure.savefig(file, dpi=100)


def table(found: list[Head], tokens: list[str], window: int) -> str:
    lines = ["| head | median life, queries | lives beyond the window | kept at the end, oldest first |"]
    lines.append("| --- | ---: | ---: | --- |")
    for head in found:
        old = len(tokens) - window  # later keys would be in a sliding window too
        kept = [f"`{tokens[i]}`" for i in range(old) if head.until[i] == len(tokens)]
        lives = head.lives()[:old]
        beyond = (lives > window).float().mean().item()
        lines.append(f"| {head.name} | {int(lives.median())} | {beyond:.0%} | {' '.join(kept) or 'the newest'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a model that has dynamic masks, and its tokenizer")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--window", type=int, help="keys a head keeps; default: the model's, 24 where it is trained")
    parser.add_argument("--steps", type=int, default=200, help="of training, without --model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/kept_keys"))
    args = parser.parse_args()
    if args.model:
        model = ThriftyForCausalLM.from_pretrained(args.model)
        tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    else:
        args.window = args.window or 24
        model, tokenizer = trained(args)
    ids = tokenizer.encode(args.text, add_special_tokens=False).ids[: model.config.max_position_embeddings]
    found = heads(model, ids, args.window)
    if not found:
        parser.error(f"{args.model} has no layer with a dynamic mask")
    window = args.window or model.config.keep_window_size
    if window >= len(ids):
        parser.error(f"the window of {window} keys holds all {len(ids)} tokens; give a longer --text, or --window")
    tokens = [tokenizer.decode([i]).replace("\n", "⏎").strip() or "␣" for i in ids]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(found, tokens, 2, args.out.with_suffix(".png"))
    args.out.with_suffix(".md").write_text(table(found, tokens, window))
    print(f"{table(found, tokens, window)}\nwrote {args.out.with_suffix('.md')} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
