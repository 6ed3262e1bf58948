"""`thrifty eval`: how well a model knows a text, at several numbers of bits."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from rich.console import Console

    from thrifty.runtime.score import Score

EPILOG = """Examples:

thrifty eval runs/notes-packed letters.txt

thrifty eval runs/demo/packed --head-bits 16,8,4 --cache-bits 32,16,8

The others are compared with the first row. A token is scored once, with at least WINDOW - STRIDE tokens before it.
"""


def main(
    model: Annotated[Path, typer.Argument(help="Folder, .gguf file or hub id of a model.", show_default=False)],
    text: Annotated[
        Path | None, typer.Argument(help="UTF-8 file; by default the held-out part of the built-in text.")
    ] = None,
    head_bits: Annotated[str, typer.Option(help="Bits of the output head: 16 (as stored), 8, 4; with commas.")] = "16",
    cache_bits: Annotated[str, typer.Option(help="Bits of keys and values: 32, 16, 8; with commas.")] = "32",
    window: Annotated[int | None, typer.Option(help="Tokens of a window.", show_default="the context")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that it advances by.", show_default="half of it")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; by default the physical cores.")] = None,
) -> None:
    """Print perplexity and bits per byte of a text, for every combination of head and cache bits.

    With the defaults the model computes what it was trained to; fewer bits are faster and move the logits a little.
    """
    from rich.console import Console

    read = _text(text)
    heads, caches = (_numbers(name, given) for name, given in (("head", head_bits), ("cache", cache_bits)))
    rows: list[tuple[int, int, Score]] = []
    for head in heads:
        for cache in caches:
            score = _score(model, read, head, cache, window, stride, threads, Console(stderr=True))
            rows.append((head, cache, score))
    console = Console(highlight=False)
    console.print(f"{rows[0][2].tokens} tokens, {rows[0][2].nbytes} bytes")
    console.print("head bits  cache bits  perplexity  bits per byte  perplexity, more")
    first = rows[0][2].perplexity
    for head, cache, score in rows:
        more = 100 * (score.perplexity / first - 1)
        console.print(f"{head:9d}  {cache:10d}  {score.perplexity:10.4f}  {score.bits_per_byte:13.5f}  {more:+14.3f} %")


def _score(
    model: Path,
    text: str,
    head_bits: int,
    cache_bits: int,
    window: int | None,
    stride: int | None,
    threads: int | None,
    console: "Console",
) -> "Score":
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from thrifty.runtime import load

    runtime = load(model, head_bits=None if head_bits == 16 else head_bits, cache_bits=cache_bits, n_threads=threads)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"head {head_bits}, cache {cache_bits} bits")
        return runtime.score(text, window, stride, lambda done, all: bar.update(task, completed=done, total=all))


def _text(path: Path | None) -> str:
    if path is None:
        from thrifty.train.corpus import builtin_corpus

        return builtin_corpus().heldout
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ThriftyError(f"[eval] the text must be a file; {path} does not exist; check the path") from None
    except UnicodeDecodeError as error:
        raise ThriftyError(f"[eval] {path} must be UTF-8; byte {error.start} is not; save it again") from error


def _numbers(name: str, given: str) -> list[int]:
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise ThriftyError(f"[eval] --{name}-bits are numbers with commas between; got '{given}'") from None
