"""The page that `thrifty demo` ends with."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from thrifty.train.curve import terminal_plot


def page(results: dict[str, Any], record: Path) -> RenderableType:
    """Loss curve, bits per byte, bytes, speeds, the tokens of both models, a sample, and what to type next."""
    return Group(
        _panel("loss (nats per token) over the steps", terminal_plot([loss for _, loss in results["loss"]])),
        _panel("held-out text, bits per byte (less is better)", _bits(results)),
        _panel("what was gained", _gains(results)),
        _panel("a sample of the packed model", Text(results["sample"]["prompt"] + results["sample"]["text"])),
        _panel("files, and what to type next", _next(results, record)),
    )


def _panel(title: str, body: RenderableType) -> Panel:
    return Panel(body, title=title, title_align="left", padding=(0, 1))


def _bits(results: dict[str, Any]) -> RenderableType:
    bits, text = results["bits_per_byte"], results["text"]
    table = Table.grid(padding=(0, 2))
    rows = (
        ("this model, torch", "torch"),
        ("this model, packed, in the runtime", "packed"),
        ("gzip -9", "gzip -9"),
        ("xz -9", "xz -9"),
        ("xz -9 that has read the training text", "xz -9 primed"),
    )
    for label, key in rows:
        ours = key in ("torch", "packed")
        table.add_row(label, Text(f"{bits[key]:.3f}", style="bold green" if ours else ""))
    training = results["training"]
    about = (
        f"{training['parameters'] / 1e6:.2f} M parameters, {training['steps']} steps in {training['seconds'] / 60:.1f}"
        f" minutes, {training['precision']} products\n"
        f"held out: {text['heldout_bytes']:,} bytes of Python {text['python']}'s help, no line of them in training\n"
        f"  sha256 {text['heldout_sha256']}\n"
        f"trained on {text['train_bytes'] / 1e6:.1f} MB of its help and standard library\n"
        f"  sha256 {text['train_sha256']}"
    )
    return Group(table, Text(""), Text(about, style="dim"))


def _gains(results: dict[str, Any]) -> RenderableType:
    size, speed, greedy = results["bytes"], results["tokens_per_second"], results["greedy"]
    table = Table.grid(padding=(0, 2))
    table.add_row("", "torch fp32", "packed, runtime", "")
    table.add_row(
        "bytes of the model",
        f"{size['fp32'] / 1e6:.2f} MB",
        f"{size['packed'] / 1e6:.2f} MB",
        f"{size['fp32'] / size['packed']:.1f} × smaller",
    )
    table.add_row(
        "tokens per second",
        f"{speed['torch dense']:.0f}",
        f"{speed['runtime']:.0f}",
        f"{speed['runtime'] / speed['torch dense']:.1f} × faster ({results['isa']}, {results['threads']} threads)",
    )
    equal = "equal" if greedy["equal"] else f"different from token {greedy['first_difference']} on"
    style = "green" if greedy["equal"] else "red"
    table.add_row(f"{greedy['tokens']} greedy tokens", "", "", Text(equal, style=style))
    parity = results["parity"]
    wrong, clear = parity["mismatches"], f"{parity['clear']} of {parity['positions']} held-out positions that are clear"
    table.add_row(
        "likeliest tokens", "", "", Text(f"{wrong} differ" if wrong else "equal", "red" if wrong else "green")
    )
    about = (
        f"the speed of torch is that of a dense model of this shape; the trained one, which quantises in torch, makes"
        f" {speed['torch']:.0f}\nthe likeliest tokens are compared at {clear}: torch's best leads by more than 1e-3 of"
        f" the range"
    )
    return Group(table, Text(""), Text(about, style="dim"))


def _next(results: dict[str, Any], record: Path) -> Table:
    files = results["files"]
    table = Table.grid(padding=(0, 2))
    for label, text in (
        ("model with latent weights", files["model"]),
        ("packed model", files["packed"]),
        ("loss curve", files["curve"]),
        ("these figures", str(record)),
        ("", ""),
        ("let it go on writing", f'thrifty generate {files["packed"]} "The "'),
        ("what it is made of", f"thrifty info {files['packed']}"),
        ("train on your own text", "thrifty train my-folder/ --output runs/mine"),
    ):
        table.add_row(Text(label, style="dim"), text)
    return table
