"""`thrifty info`: what is installed, which native code runs, and what a model is made of."""

import textwrap
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """Examples:

thrifty info

thrifty info runs/notes-packed

thrifty info model.gguf

thrifty info runs/notes-packed --json
"""

#: Most layers that a chart has a column for.
COLUMNS = 36
#: Columns of the fields of a config: what 80 leave beside the names of facts.
LINE = 62


def main(
    model: Annotated[
        Path | None, typer.Argument(help="Folder, .gguf, .safetensors or .keras file, or hub id of a model.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, native code paths, installed extras, and what a model is made of.

    Of a model: architecture, bytes and bits per weight of its parts, scales, tokenizer, and how many of its codes are
    zero, by layer. Models that do not run here are shown too.
    """
    facts: dict[str, Any] = {"thrifty": installation()}
    if model is not None:
        from thrifty.cli.describe import describe_model

        facts["model"] = describe_model(model)
    if json:
        from json import dumps

        typer.echo(dumps(facts, indent=2))
        return
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        _show(console, facts)
        return
    # What goes to a file or a pipe is not folded: a path stays one word there.
    console = Console(width=10_000)
    with console.capture() as text:
        _show(console, facts)
    typer.echo("\n".join(line.rstrip() for line in text.get().splitlines()))


def _show(console: Any, facts: dict[str, Any]) -> None:
    console.print(_table(facts["thrifty"]))
    if "model" in facts:
        show_model(console, facts["model"])


def installation() -> dict[str, Any]:
    """Versions, the native library and its code paths, threads, and the extras that are installed."""
    import platform

    import thrifty
    from thrifty import native

    library = native.info()
    return {
        "version": thrifty.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "library": library["library"] or f"none, so numpy is used: {library['reason']}",
        "built": list(library["built"]),
        "detected": list(library["detected"]),
        # Linux grants the state of AMX tiles on request, and a sandbox may refuse.
        **({"refused by the system": list(library["refused"])} if library["refused"] else {}),
        "selected": library["isa"],
        "threads": library["threads"],
        "cpu threads": library["cpu_threads"],
        "extras": _extras(),
    }


def _extras() -> dict[str, dict[str, str | None]]:
    """Versions of the modules of every extra; None where one is not installed."""
    from importlib.metadata import packages_distributions, version

    from thrifty.cli.app import EXTRA_OF

    extras: dict[str, dict[str, str | None]] = {}
    distributions = packages_distributions()
    for module, extra in EXTRA_OF.items():
        names = distributions.get(module, [])
        # One module can come in several: tensorflow in tensorflow-cpu.
        found = version(names[0]) if names else None
        extras.setdefault(extra, {})[module] = found
    return extras


def show_model(console: Any, facts: dict[str, Any]) -> None:
    """Print facts of `describe_model`: a table of them, one of the parts, and zeros by layer."""
    amounts = ("parameters", "bits per weight", "weights", "bytes", "dtypes", "total bytes", "zeros")
    console.print()
    console.print(_table({name: _short(value) for name, value in facts.items() if name not in amounts}))
    console.print()
    console.print(_parts(facts))
    if "zeros" in facts:
        estimate = " (estimated, as the weights are not packed)" if facts.get("storage") == "latent" else ""
        chart = zeros_chart(facts["zeros"], console.options.ascii_only, estimate)
        console.print()
        console.print(chart, highlight=False, markup=False, soft_wrap=True)


def zeros_chart(zeros: dict[str, Any], ascii_only: bool = False, note: str = "") -> str:
    """A line for each kind of linear: its share of zeros, and a column for each layer, all on one scale.

    More than `COLUMNS` layers share columns, so that a line keeps within 80.
    """
    ramp = "0123456789" if ascii_only else "▁▂▃▄▅▆▇█"
    layers = zeros["layers"]
    least, most = min(map(min, layers.values())), max(map(max, layers.values()))
    lines = [
        f"share of zeros: {zeros['all']:.1%} of all codes{note}",
        f"by layer, from {ramp[0]} = {least:.1%} to {ramp[-1]} = {most:.1%}",
    ]
    width = max(map(len, layers))
    for kind, shares in layers.items():
        groups = max(1, -(-len(shares) // COLUMNS))
        means = [sum(g) / len(g) for g in (shares[i : i + groups] for i in range(0, len(shares), groups))]
        heights = [round((m - least) / (most - least or 1) * (len(ramp) - 1)) for m in means]
        lines.append(f"  {kind:{width}}  {sum(shares) / len(shares):6.1%}  {''.join(ramp[h] for h in heights)}")
    return "\n".join(lines)


def _parts(facts: dict[str, Any]) -> Any:
    """Bytes, weights and types of each part, and of all."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for column in ("part", "bytes", "weights", "bits"):
        table.add_column(justify="left" if column == "part" else "right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("part", "bytes", "weights", "bits each", "stored as", style="bold")
    sizes = facts["bytes"] | {"all": facts["total bytes"]}
    weights = facts.get("weights", {}) | {"all": facts.get("parameters", 0)}
    for part, size in sizes.items():
        bits = facts.get("bits per weight", {}).get(part)
        shown = "" if bits is None else f"{bits:.2f}"
        count = f"{weights[part]:,}" if weights.get(part) else ""
        table.add_row(part, f"{size:,}", count, shown, ", ".join(facts.get("dtypes", {}).get(part, ())))
    return table


def _short(value: Any) -> Any:
    """A fact in a line, or a record in a few, each at most `LINE` columns; what it has not is left out."""
    if isinstance(value, dict):
        fields = {name: inner for name, inner in value.items() if inner is not False}
        # A name stays beside its value: what textwrap calls a space is none of the others.
        words = ", ".join(f"{name}\u00a0{_within(inner)}" for name, inner in fields.items())
        lines = textwrap.fill(words, LINE, break_long_words=False, break_on_hyphens=False)
        return lines.replace("\u00a0", " ") or "none"
    return _within(value)


def _within(value: Any) -> Any:
    """A value of a record."""
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {_within(inner)}' for name, inner in value.items())})"
    if isinstance(value, list):
        runs = [(word, len(list(run))) for word, run in groupby(map(str, value))]
        return " ".join(word if count == 1 else f"{count} {word}" for word, count in runs) or "none"
    if value is None or isinstance(value, bool):
        return "yes" if value else "no" if value is False else "none"
    return value


def _table(rows: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(Text(key, style="bold"), Text(_plain(value)))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "not installed"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
