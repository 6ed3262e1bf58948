"""`thrifty bench`: how near the kernels and the whole decode come to the memory's speed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from rich.table import Table

EPILOG = """Examples:

thrifty bench

thrifty bench runs/notes-packed --threads 1,2

thrifty bench --random large --formats base3

A step of one token reads every weight once: at best, bytes per token × tokens per second is the read bandwidth. Models
that fit into the cache are not bound by it, and may exceed it.
"""

#: [out, in] of the matrices that are timed.
SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))
#: Rows of activations in the product that stands for reading a prompt.
MANY = 256


def main(
    model: Annotated[Path | None, typer.Argument(help="Folder of a packed model, for its whole decode.")] = None,
    random: Annotated[
        str, typer.Option(help="Shape of the random model that is timed where no MODEL is given: demo, small, large.")
    ] = "small",
    formats: Annotated[str, typer.Option(help="Layouts of the weights, apart by commas.")] = "i2,base3",
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, apart by commas.", show_default="the physical cores")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the decode that are timed.", min=1)] = 100,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small buffers and few repeats: to see that it works.")
    ] = False,
) -> None:
    """Time the matrix kernels and the whole decode beside the memory's measured read bandwidth."""
    from rich.console import Console

    from thrifty import native
    from thrifty.runtime import measure

    counts = _numbers(threads) if threads else [native.default_threads()]
    layouts = formats.split(",")
    wrong = [layout for layout in layouts if layout not in native.KERNEL_FORMATS]
    if wrong:
        raise ThriftyError(f"[bench] --formats must be of {', '.join(native.KERNEL_FORMATS)}; got {wrong[0]}")
    if random not in measure.SIZES:
        raise ThriftyError(f"[bench] --random must be one of {', '.join(measure.SIZES)}; got {random}")
    nbytes = 1 << 24 if quick else max(256 << 20, 4 * measure.last_level_cache())
    where = "memory" if nbytes > measure.last_level_cache() else "the cache"
    console = Console()
    console.print(f"kernels: {native.isa()}")
    bandwidth = {}
    if native.available():
        with Console(stderr=True).status(f"reading {where}"):
            bandwidth = {n: measure.read_bandwidth(n, nbytes) for n in counts}
    for n, rate in bandwidth.items():
        console.print(f"read bandwidth of {where} with {n} thread{'s' * (n > 1)}: {rate / 1e9:.1f} GB/s")
    console.print(_matrices(layouts, bandwidth or dict.fromkeys(counts, 0.0), nbytes, where, quick))
    console.print(_decode(model, random, layouts, bandwidth or dict.fromkeys(counts, 0.0), tokens))


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as problem:
        raise ThriftyError(f"[bench] --threads takes numbers apart by commas; got {text}") from problem
    if min(numbers) < 1:
        raise ThriftyError(f"[bench] threads must be at least 1; got {text}")
    return numbers


def _matrices(layouts: list[str], bandwidth: dict[int, float], nbytes: int, where: str, quick: bool) -> "Table":
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from thrifty import native, spec
    from thrifty.runtime.measure import matmul_seconds

    title = f"ternary_matmul, matrices from {where} (share: of the read bandwidth)"
    if not native.available():
        title = "ternary_matmul through numpy, which holds a byte a weight in any format"
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for heading in ("shape", "format", "threads", "1 row\nµs", "GB/s", "share", f"{MANY} rows\nms", "TOP/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rows, cols in SHAPES[:1] if quick else SHAPES:
        for layout in layouts:
            for n, rate in bandwidth.items():
                with Console(stderr=True).status(f"{rows} × {cols} in {layout}"):
                    one = matmul_seconds(rows, cols, 1, layout, n, nbytes)
                    many = matmul_seconds(rows, cols, MANY, layout, n, 1, 2 if quick else 10)
                read = spec.FORMATS[layout].nbytes(rows, cols) if native.available() else rows * cols
                speed = read / one
                table.add_row(
                    f"{rows} × {cols}",
                    layout,
                    str(n),
                    f"{1e6 * one:.0f}",
                    f"{speed / 1e9:.1f}",
                    f"{100 * speed / rate:.0f} %" if rate else "-",
                    f"{1e3 * many:.2f}",
                    f"{2 * rows * cols * MANY / many / 1e12:.2f}",
                )
    return table


def _decode(model: Path | None, random: str, layouts: list[str], bandwidth: dict[int, float], tokens: int) -> "Table":
    from tempfile import TemporaryDirectory

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from thrifty.runtime import load
    from thrifty.runtime.measure import SIZES, step_seconds, write_random

    title = f"whole decode, {model or f'random model of shape {random}'}; head as stored, keys and values in float32"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in ("format", "threads", "ms a\ntoken", "tokens/s", "MB a\ntoken", "GB/s", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    with TemporaryDirectory() as temporary:
        folder = model or write_random(Path(temporary) / random, SIZES[random])
        for layout in layouts:
            for n, rate in bandwidth.items():
                with Console(stderr=True).status(f"decoding in {layout}"):
                    runtime = load(folder, weight_format=layout, n_threads=n)
                    # Prompt and text must fit the context.
                    seconds = step_seconds(runtime, min(tokens, runtime.max_context - 8))
                speed = runtime.bytes_per_token / seconds
                table.add_row(
                    layout,
                    str(n),
                    f"{1e3 * seconds:.3f}",
                    f"{1 / seconds:.0f}",
                    f"{runtime.bytes_per_token / 1e6:.2f}",
                    f"{speed / 1e9:.1f}",
                    f"{100 * speed / rate:.0f} %" if rate else "-",
                )
    return table
