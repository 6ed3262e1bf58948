"""`thrifty report`: the page about a run, made again from its folder."""

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

thrifty report runs/notes
"""


def main(run: Annotated[Path, typer.Argument(help="Folder of a run of thrifty train.", show_default=False)]) -> None:
    """Write report.html: losses, rates, gradients, codes by layer, speed, samples and settings of a run, on one page.

    A run keeps this page up to date by itself; this makes it again from the history in the newest checkpoint.
    """
    from thrifty.train.report import write_report

    typer.echo(write_report(run))
