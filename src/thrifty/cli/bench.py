"""`thrifty bench`: the speed of a model on this machine, beside what the machine could do at best."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.cli.options import ModelOptions, takes_options
from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from rich.table import Table

EPILOG = """Examples:

thrifty bench runs/notes-packed

thrifty bench runs/notes-packed --threads 1,2 --prompt 512 --context 64,1024

thrifty bench --shape 2b --batch 1,8 --plot 2b.png

thrifty bench runs/notes-packed --json > bench.json

How to read it. To decode a token, every weight and every cached key and value is read once: at best, bytes per token
× tokens per second is the bandwidth of the memory. To read a prompt, each weight is multiplied and added once per
token: at best, operations per second are the processor's int8 peak. Both limits are measured in turn with the model,
and the shares say how near it comes. A model in the caches is not held up by the memory: its share may exceed 100 %.
"""

#: Contexts and prompts where none are given: those that fit the model.
CONTEXTS, PROMPTS = (64, 1024, 4096), (128, 512)


@takes_options(ModelOptions)
def main(
    model: Annotated[
        Path | None, typer.Argument(help="Folder, .gguf file or hub id; without one, --shape makes one up.")
    ] = None,
    shape: Annotated[
        str, typer.Option(help="Shape of the random model where no MODEL is given: demo, small, or 2b (a gigabyte).")
    ] = "small",
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, apart by commas.", show_default="1 and the physical cores")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Positions in the cache when tokens are decoded.", show_default="64,1024,4096 where they fit"
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Tokens of the prompts that are read.", show_default="128,512 where they fit")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences that are decoded together.")] = "1",
    rounds: Annotated[int, typer.Option(help="Times that everything is measured, in turn.", min=1)] = 5,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the speeds as this PNG.", show_default="bench.png, where matplotlib is")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and draw nothing unless --plot says so.")] = False,
    *,
    options: ModelOptions,
) -> None:
    """Measure decode, prompts, memory and load of a model beside the memory's bandwidth and the processor's int8 peak.

    Each number of threads has a process of its own; they take turns, and the table shows medians with the lowest and
    highest of all rounds. The options of the model and their defaults are those of `thrifty generate`.
    """
    from tempfile import TemporaryDirectory

    from thrifty import native
    from thrifty.runtime import measure

    if shape not in measure.SIZES:
        raise ThriftyError(f"[bench] --shape must be one of {', '.join(measure.SIZES)}; got {shape}")
    lists = {"--threads": threads, "--context": context, "--prompt": prompt, "--batch": batch}
    chosen = {name: None if text is None else _numbers(name, text) for name, text in lists.items()}
    with TemporaryDirectory() as temporary:
        folder = model or measure.write_random(Path(temporary) / shape, measure.SIZES[shape])
        contexts, prompts = _that_fit(folder, chosen["--context"], chosen["--prompt"])
        counts = chosen["--threads"] or sorted({1, native.default_threads()})
        results = {
            "model": str(model) if model else f"random weights of shape {shape}",
            "kernels": native.isa(),
            **options.arguments(),
            "rounds": rounds,
            "threads": _measure(
                folder, counts, contexts, prompts, chosen["--batch"] or [1], options.arguments(), rounds
            ),
        }
    _report(results, plot, json)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError as problem:
        raise ThriftyError(f"[bench] {option} takes numbers apart by commas; got {text}") from problem
    if numbers[0] < 1:
        raise ThriftyError(f"[bench] {option} takes numbers from 1; got {numbers[0]}")
    return numbers


def _that_fit(folder: Path, contexts: list[int] | None, prompts: list[int] | None) -> tuple[list[int], list[int]]:
    """Contexts and prompts to measure. Raises ThriftyError where one that was asked for exceeds the model's."""
    from thrifty.checkpoint import open_model

    limit = open_model(folder).config.max_position_embeddings
    for name, numbers in (("--context", contexts), ("--prompt", prompts)):
        if numbers and numbers[-1] > limit:
            raise ThriftyError(f"[bench] {name} may be at most {limit}, the model's context; got {numbers[-1]}")
    return (
        contexts or sorted({min(n, limit) for n in CONTEXTS}),
        prompts or sorted({min(n, limit) for n in PROMPTS}),
    )


def _measure(
    folder: Path,
    counts: list[int],
    contexts: list[int],
    prompts: list[int],
    batches: list[int],
    options: dict[str, Any],
    rounds: int,
) -> list[dict[str, Any]]:
    """A record for each number of threads."""
    from contextlib import ExitStack

    from rich.console import Console
    from rich.progress import Progress

    from thrifty.runtime import measure
    from thrifty.runtime.worker import Worker

    cases = [("decode", batch, n) for batch in batches for n in contexts] + [("prefill", 1, n) for n in prompts]
    largest = max(*contexts, *prompts)
    limits = measure.Limits()
    records: list[dict[str, Any]] = []
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = progress.add_task("loading", total=rounds * len(cases) * len(counts))
        measure.warm(folder)
        workers = {n: stack.enter_context(Worker(f"thrifty with {_threads(n)}")) for n in counts}
        loaded = {
            n: worker("load", path=str(folder), n_threads=n, max_context=largest, **options)
            for n, worker in workers.items()
        }
        taken: dict[tuple, list[dict[str, float]]] = {}
        speeds: dict[int, list[dict[str, float]]] = {n: [] for n in counts}
        # The first round warms up: it touches the caches' pages and takes the processor out of its sleep.
        for turn in range(-1, rounds):
            for n, worker in workers.items():
                limit = limits(n)
                for what, batch, size in cases:
                    progress.update(task, description=f"{_threads(n)}, {what} {size}", advance=float(turn >= 0))
                    one = _once(worker, what, batch, size, loaded[n]["operations_per_token"], limit, quick=turn < 0)
                    if turn >= 0:
                        taken.setdefault((n, what, batch, size), []).append(one)
                if turn >= 0:
                    speeds[n].append(limit)
        for n, worker in workers.items():
            record = {"threads": n, **loaded[n], "cache_positions": largest, "memory": worker("memory")}
            record |= {name: measure.summary([s[name] for s in speeds[n]]) for name in speeds[n][0]}
            for what in ("decode", "prefill"):
                record[what] = [
                    {"batch": batch, "size": size, **_medians(taken[n, kind, batch, size])}
                    for kind, batch, size in cases
                    if kind == what
                ]
            records.append(record)
    return records


def _once(
    worker: Any, what: str, batch: int, size: int, operations: int, limit: dict[str, float], quick: bool
) -> dict[str, float]:
    """One measurement and its share of the limit that was measured in the same round."""
    from statistics import median

    if what == "decode":
        answer = worker("decode", context=size, batch=batch, seconds=0.0 if quick else 0.3)
        seconds = median(answer["seconds"])
        rate = answer["bytes"] / seconds
        found = {"tokens_per_second": batch / seconds, "bytes_per_token": answer["bytes"] / batch}
        return found | {"bytes_per_second": rate} | ({"share": rate / limit["bandwidth"]} if limit else {})
    seconds = worker("prefill", prompt=size)
    rate = operations * size / seconds
    found = {"tokens_per_second": size / seconds, "operations_per_second": rate}
    return found | ({"share": rate / limit["int8_peak"]} if limit else {})


def _medians(taken: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    from thrifty.runtime.measure import summary

    return {name: summary([one[name] for one in taken]) for name in taken[0]}


def _report(results: dict[str, Any], plot: Path | None, json: bool) -> None:
    from rich.console import Console

    if json:
        from json import dumps

        typer.echo(dumps(results, indent=2))
    else:
        console = Console()
        for line in _lines(results):
            console.print(line, highlight=False, markup=False)
        console.print(_decode_table(results["threads"]))
        console.print(_prefill_table(results["threads"]))
        console.print(_memory_table(results["threads"]))
    if plot is None and json:
        return
    try:
        _draw(results, plot or Path("bench.png"))
    except ModuleNotFoundError:
        if plot is not None:
            raise
        typer.echo("no picture: matplotlib is not installed (pip install 'thrifty[train]')", err=True)
        return
    typer.echo(f"picture: {plot or 'bench.png'}", err=True)


def _lines(results: dict[str, Any]) -> list[str]:
    head = "as stored" if results["head_bits"] is None else f"{results['head_bits']} bits"
    layouts = sorted({record["weight_format"] for record in results["threads"]})
    lines = [
        f"{results['model']}: weights in {' and '.join(layouts)}, head {head}, cache {results['cache_bits']} bits;"
        f" kernels {results['kernels']}"
    ]
    for record in results["threads"]:
        if "bandwidth" in record:
            lines.append(
                f"{_threads(record['threads'])}: memory is read at {record['bandwidth']['median'] / 1e9:.1f} GB/s,"
                f" int8 products run at {record['int8_peak']['median'] / 1e12:.2f} TOP/s"
            )
    return lines


def _table(title: str, headings: tuple[str, ...]) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=title, box=SIMPLE, title_justify="left", padding=0, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _decode_table(records: list[dict[str, Any]]) -> "Table":
    headings = ("threads", "batch", "context", "tokens/s", "lowest–highest", "MB/token", "GB/s", "share")
    table = _table("decode (share: of the bandwidth)", headings)
    for record in records:
        for row in record["decode"]:
            table.add_row(
                *(str(record["threads"]), str(row["batch"]), str(row["size"]), *_speed(row["tokens_per_second"])),
                f"{row['bytes_per_token']['median'] / 1e6:.2f}",
                f"{row['bytes_per_second']['median'] / 1e9:.1f}",
                _share(row),
            )
    return table


def _prefill_table(records: list[dict[str, Any]]) -> "Table":
    headings = ("threads", "prompt", "tokens/s", "lowest–highest", "TOP/s", "share")
    table = _table("prompts (share: of the int8 peak)", headings)
    for record in records:
        for row in record["prefill"]:
            table.add_row(
                *(str(record["threads"]), str(row["size"]), *_speed(row["tokens_per_second"])),
                f"{row['operations_per_second']['median'] / 1e12:.3f}",
                _share(row),
            )
    return table


def _memory_table(records: list[dict[str, Any]]) -> "Table":
    table = _table(
        "load, and memory in MB (anonymous: weights, cache and all else that is no file)",
        ("threads", "load s", "weights", "cache", "most anonymous", "most with files"),
    )
    for record in records:
        # The widest batch has that many caches.
        batch = max(row["batch"] for row in record["decode"])
        cache = batch * record["cache_positions"] * record["cache_bytes_per_position"]
        held = record["memory"] or {}
        table.add_row(
            *(str(record["threads"]), f"{record['load_seconds']:.2f}"),
            *(f"{n / 1e6:.1f}" for n in (record["weight_bytes"], cache)),
            *(f"{held[name] / 1e6:.0f}" if held else "-" for name in ("anonymous", "peak")),
        )
    return table


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def _speed(values: dict[str, float]) -> tuple[str, str]:
    digits = 1 if values["median"] < 1000 else 0
    return f"{values['median']:.{digits}f}", f"{values['low']:.{digits}f}–{values['high']:.{digits}f}"


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['share']['median']:.0f} %" if "share" in row else "-"


def _draw(results: dict[str, Any], file: Path) -> None:
    """Decode over the context and prompts over their length, each beside what the machine could do at best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from thrifty.checkpoint import atomic_file

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for record in results["threads"]:
        for axes, what in zip(panels, ("decode", "prefill"), strict=True):
            for batch in sorted({row["batch"] for row in record[what]}):
                rows = [row for row in record[what] if row["batch"] == batch]
                sizes, speeds = [row["size"] for row in rows], [row["tokens_per_second"] for row in rows]
                middle = [speed["median"] for speed in speeds]
                ends = [[m - s["low"] for m, s in zip(middle, speeds, strict=True)]]
                ends.append([s["high"] - m for m, s in zip(middle, speeds, strict=True)])
                label = _threads(record["threads"]) + (f", batch {batch}" if batch > 1 else "")
                line = axes.errorbar(sizes, middle, ends, label=label, marker="o", markersize=4, capsize=3)
                if "share" in rows[0]:
                    best = [m / row["share"]["median"] for m, row in zip(middle, rows, strict=True)]
                    axes.plot(sizes, best, linestyle="--", alpha=0.6, color=line[0].get_color())
    for axes, title, below in zip(
        panels,
        ("decode (dashed: bandwidth over bytes)", "prompt (dashed: int8 peak over operations)"),
        ("positions in the cache", "tokens of the prompt"),
        strict=True,
    ):
        axes.set(xlabel=below, ylabel="tokens per second", title=title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend()
    first = results["threads"][0]
    held = f", {first['memory']['anonymous'] / 1e6:.0f} MB anonymous" if first["memory"] else ""
    figure.suptitle(f"{results['model']}: {results['kernels']}, loaded in {first['load_seconds']:.2f} s{held}")
    with atomic_file(file) as picture:
        figure.savefig(picture, format="png", dpi=120)
