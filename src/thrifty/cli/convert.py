"""`thrifty convert`: a model in the files of another program."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from thrifty.convert import Conversion
    from thrifty.convert.report import Written

EPILOG = """Examples:

thrifty convert runs/demo/packed demo.gguf    (for llama.cpp)

thrifty convert demo.gguf demo    (a folder again)

thrifty convert owner/name-1.58bit model --to autobitlinear    (from the hub)

thrifty convert model model.gguf --weight-type TQ1_0 --head-type F16

Codes and scales of ternary weights are the same bits on every way there and back. What is rounded is printed.
"""

#: Ends of names that are no folder's.
FILES = (".safetensors", ".bin", ".pt", ".pth", ".keras", ".json")
TARGETS = ("autobitlinear", "bitlinear", "gguf")


def main(
    source: Annotated[Path, typer.Argument(help="Folder, .gguf file or hub id.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder or .gguf file to write.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option(
            help="autobitlinear or bitlinear (transformers' layers, whose scales multiply and divide), or gguf.",
            show_default="gguf for a .gguf file, else autobitlinear",
        ),
    ] = None,
    weight_type: Annotated[
        str | None,
        typer.Option(help="GGUF: ternary weights as TQ2_0 (2.06 bits) or TQ1_0 (1.69).", show_default="TQ2_0"),
    ] = None,
    head_type: Annotated[
        str | None, typer.Option(help="GGUF: embedding and head as Q8_0, F16, BF16 or F32.", show_default="Q8_0")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Folders: dense tensors as bfloat16, float16 or float32.", show_default="as they are"),
    ] = None,
    any_activation: Annotated[
        bool, typer.Option("--any-activation", help="GGUF: write activations that llama.cpp takes for SiLU.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output where it exists.")] = False,
) -> None:
    """Write a model in the files of another program: for transformers, or for llama.cpp.

    Reads folders of transformers (BitNet, Llama, Mistral, Qwen: packed by either convention, or master weights), of
    1bitLLM and of this package, and GGUF files (TQ1_0, TQ2_0, I2_S). Needs no torch, and memory for a few tensors.
    """
    to = to.lower() if to else "gguf" if output.suffix == ".gguf" else "autobitlinear"
    if to not in TARGETS:
        raise ThriftyError(f"[convert] --to must be one of {', '.join(TARGETS)}; got '{to}'")
    if (to == "gguf") != (output.suffix == ".gguf") or output.suffix.lower() in FILES:
        raise ThriftyError(
            f"[convert] a GGUF file's name ends in .gguf, and a folder's like no file's; got {output} for '{to}'"
        )
    of_gguf = {"--weight-type": weight_type, "--head-type": head_type, "--any-activation": any_activation or None}
    for name, value in ({"--dtype": dtype} if to == "gguf" else of_gguf).items():
        if value is not None:
            raise ThriftyError(f"[convert] {name} has no meaning for '{to}'; leave it out")
    from thrifty.convert import to_gguf, to_transformers
    from thrifty.convert.report import opened

    start = time.perf_counter()
    model = opened(source)

    def run(written: "Written") -> "Conversion":
        if to == "gguf":
            kinds = ((weight_type or "TQ2_0").upper(), (head_type or "Q8_0").upper())
            return to_gguf(model, output, *kinds, any_activation=any_activation, overwrite=force, written=written)
        return to_transformers(model, output, to, dtype=dtype, overwrite=force, written=written)

    report = _with_bar(len(model.tensors), run)
    _print(report, sum(tensor.data.nbytes for tensor in model.tensors.values()), time.perf_counter() - start)


def _with_bar(tensors: int, run: "Callable[[Written], Conversion]") -> "Conversion":
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=tensors)
        return run(lambda _: progress.advance(task))


def _print(report: "Conversion", read: int, seconds: float) -> None:
    for kind, (count, nbytes) in sorted(report.kinds.items()):
        print(f"  {kind:16} {count:5d} tensors  {nbytes / 1e6:10.2f} MB", file=sys.stderr)
    for note in report.notes:
        print(f"  note: {note}", file=sys.stderr)
    total = sum(nbytes for _, nbytes in report.kinds.values())
    speed = f"{read / 1e6:.2f} MB read, {total / 1e6:.2f} MB written, {seconds:.1f} s"
    print(f"{report.output}: {speed}", file=sys.stderr)
