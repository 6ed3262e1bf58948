"""`thrifty info`: what is installed, which native code runs, and what a model is made of."""

from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """Examples:

thrifty info

thrifty info runs/notes-packed

thrifty info runs/notes-packed --json
"""

#: Parts of a model, and what their tensors' names hold.
PARTS = {"embedding": "embed_tokens", "head": "lm_head", "norms": "norm"}


def main(
    model: Annotated[Path | None, typer.Argument(help="Folder of a model, packed or not.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, native code paths, installed extras, and what a model is made of."""
    facts = {"thrifty": installation()} | ({"model": describe_model(model)} if model else {})
    if json:
        from json import dumps

        typer.echo(dumps(facts, indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        # What goes to a file or a pipe is not folded: a path stays one word there.
        console = Console(width=10_000)
    for rows in facts.values():
        console.print(_table(rows))


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


def describe_model(path: Path) -> dict[str, Any]:
    """The model's shape, how its weights are stored, and the bytes of its parts.

    Errors: a folder that is not a model, tensors that do not match its config.
    """
    from dataclasses import asdict

    from thrifty.checkpoint import open_folder

    folder = open_folder(path)
    config = {name: value for name, value in asdict(folder.config).items() if value is not None}
    config["mixers"] = list(config["mixers"])
    storage = "latent" if config.pop("storage") == "latent" else "packed, 2 bits a weight"
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in folder.tensors.items():
        part = next((part for part, mark in PARTS.items() if mark in name), f"{folder.config.linear} linears")
        entry = parts.setdefault(part, {"bytes": 0, "dtypes": set()})
        entry["bytes"] += tensor.data.nbytes
        entry["dtypes"].add(tensor.dtype)
    return {
        "path": str(path),
        "storage": "dense" if folder.config.linear == "dense" else storage,
        **config,
        "bytes": {part: entry["bytes"] for part, entry in parts.items()},
        "dtypes": {part: sorted(entry["dtypes"]) for part, entry in parts.items()},
        "total bytes": sum(entry["bytes"] for entry in parts.values()),
    }


def _extras() -> dict[str, dict[str, str | None]]:
    """Versions of the modules of every extra; None where one is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    from thrifty.cli.app import EXTRA_OF

    extras: dict[str, dict[str, str | None]] = {}
    for module, extra in EXTRA_OF.items():
        try:
            found = version(module)
        except PackageNotFoundError:
            found = None
        extras.setdefault(extra, {})[module] = found
    return extras


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
