"""`thrifty train`: text in, a trained model out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from thrifty.train.corpus import Corpus
    from thrifty.train.recipe import Recipe

EPILOG = """Examples:

thrifty train    (the built-in text, the demo's model)

thrifty train notes.txt --recipe tiny --output runs/notes

thrifty train my-folder/ --steps 2000 --set hidden_size=512

thrifty train --model doge --linear ternary    (dynamic mask attention)

thrifty train notes.txt --recipe continue --from dense    (made ternary)

thrifty train notes.txt --recipe distill --from dense --teacher dense

thrifty train --dataset roneneldan/TinyStories --max-minutes 60

thrifty train talks.jsonl --recipe sft --from runs/notes    (or dpo, lora)

Repeat a command that was interrupted, and it goes on from its newest checkpoint. What comes next:
thrifty pack runs/notes runs/notes-packed
"""


def main(
    text: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files or folders of text, JSON lines or Parquet. Left out: Python's help topics and standard library."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the model and all about the run.", show_default="runs/NAME"),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="What to do, and how: a name (--recipe list shows them) or a YAML file of your own.")
    ] = "demo",
    from_: Annotated[
        str | None,
        typer.Option("--from", help="A model to go on from, a folder or hub id: dense, latent or packed."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A model to learn from, with the same tokenizer: a folder or hub id.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="What it is made of: bitnet, doge, cheems or matmulfree.", show_default="bitnet"),
    ] = None,
    linear: Annotated[
        str | None,
        typer.Option(help="Weights of its linear layers: ternary, binary or dense.", show_default="the model's own"),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="A data set of Hugging Face, beside TEXT or instead: a hub id, or a folder of one. Repeatable."
        ),
    ] = None,
    dataset_config: Annotated[str | None, typer.Option(help="The data set's configuration.")] = None,
    column: Annotated[
        str | None, typer.Option(help="The column of text, where there are rows.", show_default="text")
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WEIGHT", help="Share of a text or data set in a mixture.", show_default="by size"),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read texts while training, rather than whole at first.")
    ] = False,
    heldout: Annotated[
        str, typer.Option(help="Held out to judge by: a share of the text, a file, or a split of the data set.")
    ] = "0.05",
    tokenizer: Annotated[
        str,
        typer.Option(
            help="bpe: byte pairs, as many as --vocab-size says; bytes; or a folder, tokenizer.json or hub id."
        ),
    ] = "bpe",
    vocab_size: Annotated[int | None, typer.Option(help="Pieces of the tokenizer.", show_default="recipe")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="recipe")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a step.", show_default="recipe")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sequence.", show_default="recipe")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Largest learning rate of the matrices.", show_default="recipe")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random choice.", show_default="recipe")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of the recipe; may be repeated."),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Time a few steps first, and make only as many as fit.", show_default="no limit"),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh",
            help="Insist on going on from a checkpoint, or start anew.",
            show_default="go on where there is a checkpoint",
        ),
    ] = None,
) -> None:
    """Train a language model on text.

    The folder gets the model with its latent weights, the tokenizer, checkpoints to resume from, TensorBoard logs
    (tensorboard --logdir runs), the loss curve as a picture, and a record of everything that decided the result.
    """
    from thrifty.train.process import is_first, prepare_process, sequences_at_once, world_size

    prepare_process()
    from thrifty.train.recipe import find_recipe

    if recipe == "list":
        _list_recipes()
        return
    options = {
        "model": model,
        "linear": linear,
        "vocab_size": _vocab_size(tokenizer, vocab_size),
        "steps": steps,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    # All at once: some fields only fit together.
    chosen = find_recipe(recipe).override(**options | _fields(set_ or []))
    if chosen.method != "pretrain":
        if world_size() > 1:
            rule = "[train] only recipes of the method pretrain are computed by several processes"
            raise ThriftyError(f"{rule}; got {chosen.name}; start it without a launcher")
        _tune(text or [], dataset or [], from_, chosen, output, heldout, resume, max_minutes)
        return
    # Before a text is fetched.
    sequences_at_once(chosen.training.batch_size, chosen.training.accumulate)
    corpus, name = _corpus(
        text or [],
        dataset or [],
        config=dataset_config,
        column=column,
        shares=_shares(mix),
        heldout=heldout,
        stream=stream,
    )
    folder = output or Path("runs") / name
    from rich.console import Console

    from thrifty.train.trainer import train

    console = Console(stderr=True, soft_wrap=True, quiet=not is_first())
    limits = {"resume": resume, "max_minutes": max_minutes}
    models = {"start": from_, "teacher": teacher, "tokenizer": None if tokenizer in _TRAINED else tokenizer}
    result = train(corpus, chosen, folder, console=console, **models, **limits)
    score = result.record["bits_per_byte"]
    if score is not None:
        console.print(f"[bold]done[/]    held-out text: {score:.3f} bits per byte")
    console.print(f"[bold]curve[/]   {folder / 'loss.png'}")
    console.print(f"[bold]report[/]  {folder / 'report.html'}")
    console.print(f"[bold]next[/]    thrifty pack {folder} {folder}-packed")
    if is_first():
        typer.echo(folder)


def _tune(
    texts: list[Path],
    datasets: list[str],
    start: str | None,
    recipe: "Recipe",
    output: Path | None,
    heldout: str,
    resume: bool | None,
    max_minutes: float | None,
) -> None:
    """Tune a model that is there, by the methods that need rows of answers."""
    from thrifty.train.corpus import heldout_share

    data = [*texts, *datasets]
    share = heldout_share(heldout)
    if share is None:
        rule = "[train] rows to tune on are held out by their share"
        raise ThriftyError(f"{rule}; got --heldout {heldout}; give a number below 1")
    if start is None or not data:
        rule = f"[train] the recipe {recipe.name} tunes a model on rows; got no {'--from' if data else 'data'}"
        raise ThriftyError(f"{rule}; thrifty train talks.jsonl --recipe {recipe.name} --from FOLDER")
    if max_minutes is not None:
        raise ThriftyError(f"[train] --max-minutes is for new models; got it with {recipe.name}; give --steps")
    folder = output or Path("runs") / f"{Path(data[0]).stem}-{recipe.name}"
    from rich.console import Console

    from thrifty.train.tuning import tune

    console = Console(stderr=True, soft_wrap=True)
    result = tune(start, data, recipe, folder, heldout=share, resume=resume, console=console)
    scores = ", ".join(f"{name} {score:.3f}" for name, score in result.record["heldout"].items())
    if scores:
        console.print(f"[bold]done[/]    held-out rows: {scores}")
    console.print(f"[bold]curve[/]   {folder / 'loss.png'}")
    console.print(f"[bold]next[/]    thrifty pack {folder} {folder}-packed")
    typer.echo(folder)


#: Tokenizers that are trained on the text.
_TRAINED = ("bpe", "bytes")


def _corpus(texts: list[Path], datasets: list[str], **options: Any) -> "tuple[Corpus, str]":
    """The text to train on, and a name for its run."""
    from thrifty.train.corpus import open_corpus

    corpus = open_corpus(texts, datasets, **options)
    names = [text.resolve().name.partition(".")[0] for text in texts] + [Path(name).name for name in datasets]
    return corpus, "-".join(names) or "builtin"


def _shares(mix: list[str] | None) -> dict[str, float]:
    """The weights that `--mix` gives."""
    shares = {}
    for assignment in mix or []:
        name, _, weight = assignment.rpartition("=")
        try:
            shares[name] = float(weight)
        except ValueError as problem:
            raise ThriftyError(f"[train] --mix takes NAME=WEIGHT, a number; got {assignment}") from problem
    return shares


def _vocab_size(tokenizer: str, vocab_size: int | None) -> int | None:
    from thrifty.train.tokenizer import SMALLEST

    if tokenizer not in _TRAINED and vocab_size is not None:
        raise ThriftyError(
            f"[train] a tokenizer that is given has its own pieces; got --vocab-size {vocab_size}; leave it out"
        )
    if tokenizer == "bytes":
        if vocab_size not in (None, SMALLEST):
            raise ThriftyError(
                f"[train] plain bytes have {SMALLEST} pieces; got --vocab-size {vocab_size}; leave it out"
            )
        return SMALLEST
    return vocab_size


def _list_recipes() -> None:
    """Print the recipes there are."""
    from thrifty.train.recipe import find_recipe, recipe_names

    for name in recipe_names():
        typer.echo(f"{name:10} {find_recipe(name).about}")


def _fields(assignments: list[str]) -> dict[str, str]:
    """The fields that `--set` names, as text."""
    fields = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ThriftyError(f"[train] --set takes FIELD=VALUE; got {assignment}")
        fields[name] = value
    return fields
