"""`thrifty eval`: how well models know a text, and what they score on the tasks of lm-evaluation-harness."""

import json as json_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from thrifty.checkpoint import Folder
    from thrifty.runtime.score import Score

EPILOG = """Examples:

thrifty eval runs/notes-packed letters.txt

thrifty eval runs/notes runs/notes-packed letters.txt    (packing is free)

thrifty eval runs/demo/packed --head-bits 16,8,4 --cache-bits 32,16,8

thrifty eval runs/notes-packed --tasks arc_easy,hellaswag --limit 100

Tasks need the extra 'harness'. The other rows are compared with the first. A token is scored once, with at least
WINDOW - STRIDE tokens before it.
"""

ENGINES = ("auto", "torch", "runtime")


@dataclass(frozen=True)
class Place:
    """A model to evaluate, and what by."""

    name: str
    folder: "Folder"
    #: "torch" or "runtime".
    engine: str

    @property
    def weights(self) -> str:
        """What the folder stores: "dense", "latent" or "packed"."""
        config = self.folder.config
        return "dense" if config.linear == "dense" else "latent" if config.storage == "latent" else "packed"


def main(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Folders, .gguf files or hub ids of models, and last the text, a UTF-8 file: by default the held-out "
            "part of the built-in one.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas; the text is left out unless given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task.", min=1, show_default="all")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each question.", min=0, show_default="the task's own")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with YAML files of tasks of your own.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="torch, runtime, or auto: torch for latent and dense weights as long as no bits are chosen, the "
            "runtime for packed ones."
        ),
    ] = "auto",
    head_bits: Annotated[str, typer.Option(help="Bits of the output head: 16 (as stored), 8, 4; with commas.")] = "16",
    cache_bits: Annotated[str, typer.Option(help="Bits of keys and values: 32, 16, 8; with commas.")] = "32",
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window.", show_default="the shortest context of the models")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that it advances by.", show_default="half of it")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; by default the physical cores.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print perplexity and bits per byte of a text, or results of tasks, for one model or several.

    Trained folders are computed by torch in float32, packed ones by the runtime, at every combination of head and cache
    bits: with the defaults a packed model computes what it was trained to; fewer bits are faster and move the logits a
    little.
    """
    from rich.console import Console

    names, text = _split(places)
    heads, caches = (_numbers(name, given) for name, given in (("head", head_bits), ("cache", cache_bits)))
    bits = [(head, cache) for head in heads for cache in caches]
    if tasks is not None and len(bits) > 1:
        raise ThriftyError(f"[eval] tasks take one number of head and of cache bits; got {len(bits)} combinations")
    models = [_place(name, engine, bits != [(16, 32)]) for name in names]
    results: dict[str, Any] = {}
    if text is not None or tasks is None:
        read = _text(text)
        window = min(model.folder.config.max_position_embeddings for model in models) if window is None else window
        results["text"] = {
            "name": "the built-in held-out text" if text is None else str(text),
            "bytes": len(read.encode()),
            "window": window,
            "rows": [row for m in models for row in _rows(m, read, bits, window, stride, threads)],
        }
    if tasks is not None:
        from thrifty.cli.harness import evaluate

        results["tasks"] = evaluate(models, tasks.split(","), limit, num_fewshot, include_path, bits[0], threads)
    if json:
        typer.echo(json_module.dumps(results, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    if "text" in results:
        _print_text(console.print, results["text"])
    if "tasks" in results:
        _print_tasks(console.print, results["tasks"])


def _split(places: list[str]) -> tuple[list[str], Path | None]:
    """The models, and the text where the last place is one."""
    last = Path(places[-1]).expanduser()
    if not last.is_file() or last.suffix == ".gguf":
        return places, None
    if len(places) == 1:
        raise ThriftyError(f"[eval] there must be a model; got the text {last} alone; name the model before it")
    return places[:-1], last


def _place(name: str, engine: str, has_bits: bool) -> Place:
    from importlib.util import find_spec

    from thrifty import native
    from thrifty.checkpoint import open_model

    if engine not in ENGINES:
        raise ThriftyError(f"[eval] --engine must be one of {', '.join(ENGINES)}; got {engine}")
    if engine == "torch" and has_bits:
        raise ThriftyError("[eval] head and cache bits are the runtime's; got --engine torch; leave one of them out")
    folder = open_model(name, native.gguf_decode)
    place = Place(name, folder, "runtime" if engine == "auto" else engine)
    if engine == "torch" and folder.path.is_file():
        raise ThriftyError(f"[eval] torch reads folders; got the file {name}; leave --engine out")
    torch = engine == "auto" and not has_bits and place.weights != "packed" and not folder.path.is_file()
    if torch and find_spec("torch") is not None and find_spec("transformers") is not None:
        return Place(name, folder, "torch")
    return place


def _rows(
    place: Place, text: str, bits: list[tuple[int, int]], window: int, stride: int | None, threads: int | None
) -> Iterator[dict[str, Any]]:
    """A model's rows of the table."""
    for head, cache in bits:
        with _progress(f"{place.name}, head {head}, cache {cache} bits") as progress:
            score = score_of(place, text, (head, cache), window, stride, threads, progress)
        row = {"model": place.name, "weights": place.weights, "engine": place.engine}
        row |= {"head_bits": head, "cache_bits": cache, **asdict(score)}
        yield row | {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}


def score_of(
    place: Place,
    text: str,
    bits: tuple[int, int],
    window: int,
    stride: int | None,
    threads: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> "Score":
    """Negative log-likelihood of a text by a model, computed by its engine."""
    if place.engine == "runtime":
        return load_runtime(place, bits, threads).score(text, window, stride, progress)
    from thrifty.runtime.text import read_tokenizer
    from thrifty.train.evaluate import score

    tokenizer = read_tokenizer(place.folder)
    if tokenizer is None:
        raise ThriftyError(f"[eval] text needs a tokenizer; {place.name} has no tokenizer.json")
    return score(load_torch(place, threads), tokenizer, text, window, stride, progress)


def load_runtime(place: Place, bits: tuple[int, int], threads: int | None) -> Any:
    """The runtime of a model."""
    from thrifty.runtime import load

    head, cache = bits
    return load(place.name, head_bits=None if head == 16 else head, cache_bits=cache, n_threads=threads)


def load_torch(place: Place, threads: int | None) -> Any:
    """The torch model of a folder in float32, on the accelerator if there is one."""
    import torch
    from transformers.utils import logging

    from thrifty.models import ThriftyForCausalLM

    if threads is not None:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    model: Any = ThriftyForCausalLM.from_pretrained(place.folder.path, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, if there is one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label)
        yield lambda done, all: bar.update(task, completed=done, total=all)


def _print_text(say: Callable[[str], None], text: dict[str, Any]) -> None:
    rows = text["rows"]
    say(f"{text['name']}: {text['bytes']} bytes, windows of {text['window']} tokens")
    width = max(len("model"), *(len(row["model"]) for row in rows))
    say(f"{'model':{width}}  weights  engine   head  cache    tokens  perplexity  bits per byte      more")
    first = rows[0]["bits_per_byte"]
    for row in rows:
        more = 100 * (row["bits_per_byte"] / first - 1)
        say(
            f"{row['model']:{width}}  {row['weights']:7}  {row['engine']:7}  {row['head_bits']:4}"
            f"  {row['cache_bits']:5}  {row['tokens']:8}  {row['perplexity']:10.4f}  {row['bits_per_byte']:13.5f}"
            f"  {more:+6.3f} %"
        )


def _print_tasks(say: Callable[[str], None], tasks: dict[str, Any]) -> None:
    names = [model["model"] for model in tasks["models"]]
    results = [model["results"] for model in tasks["models"]]
    cells = [
        (task, metric, [_cell(result[task], metric) for result in results])
        for task in results[0]
        for metric in results[0][task]
        if not metric.endswith("_stderr")
    ]
    first = max(len("task"), *(len(task) for task, _, _ in cells))
    second = max(len("metric"), *(len(metric) for _, metric, _ in cells))
    widths = [max(18, len(name)) for name in names]
    heading = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    say(f"{'task':{first}}  {'metric':{second}}  {heading}")
    for task, metric, values in cells:
        row = "  ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        say(f"{task:{first}}  {metric:{second}}  {row}")


def _cell(metrics: dict[str, float], metric: str) -> str:
    value, spread = metrics[metric], metrics.get(f"{metric}_stderr")
    return f"{value:.5f}" if spread is None else f"{value:.5f} ± {spread:.5f}"


def _text(path: Path | None) -> str:
    if path is None:
        from thrifty.train.corpus import builtin_corpus

        return builtin_corpus().heldout
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ThriftyError(f"[eval] {path} must be UTF-8; byte {error.start} is not; save it again") from error


def _numbers(name: str, given: str) -> list[int]:
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise ThriftyError(f"[eval] --{name}-bits are numbers with commas between; got '{given}'") from None
