"""`thrifty pack`: the small copy of a trained model."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from thrifty.errors import ThriftyError

EPILOG = """Examples:

thrifty pack runs/notes

thrifty pack runs/notes notes-packed --dtype float32

thrifty pack runs/talks-lora packed --text a.txt    (merges an adapter)
"""

DTYPES = ("bfloat16", "float32")


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", show_default=False)],
    output: Annotated[Path | None, typer.Argument(help="Folder to write.", show_default="MODEL-packed")] = None,
    dtype: Annotated[str, typer.Option(help="Embedding, norms and head: bfloat16 or float32.")] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder where it exists.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="Of an adapter: a UTF-8 file to compare base, adapter and merged model on.")
    ] = None,
) -> None:
    """Make the small copy of a trained model: two bits per weight, or 16 where linears are dense.

    The copy runs without torch (`thrifty generate`), and plain transformers loads it where the model is a BitNet. An
    adapter (--recipe lora) is merged into its base, which is ternarised again: that loses something, which is printed
    and kept in merging.json.
    """
    output = output or model.resolve().with_name(f"{model.resolve().name}-packed")
    if (model / "adapter_config.json").is_file():
        _merge(model, output, dtype, force, text)
        return
    if text is not None:
        raise ThriftyError(f"[pack] --text is for adapters, which packing changes; {model} is none; leave it out")
    pack_folder(model, output, dtype, overwrite=force)
    before, after = _bytes(model), _bytes(output)
    print(f"{output}: {after / 1e6:.2f} MB of tensors, {before / after:.1f} times smaller", file=sys.stderr)


def _merge(adapter: Path, output: Path, dtype: str, force: bool, text: Path | None) -> None:
    if dtype not in DTYPES:
        raise ThriftyError(f"[pack] dtype must be one of {', '.join(DTYPES)}; got '{dtype}'")
    import torch
    from rich.console import Console

    from thrifty.train.merging import merge_folder

    with _without_bars():
        report = merge_folder(adapter, output, getattr(torch, dtype), overwrite=force, text=_read(text))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("layers           codes that changed  error of the weights  of the adapter, lost")
    for name, layers in report.by_kind().items():
        flipped = sum(layer.flipped or 0.0 for layer in layers) / len(layers)
        error, lost = (sum(getattr(layer, field) for layer in layers) / len(layers) for field in ("error", "lost"))
        console.print(f"{name:15}  {100 * flipped:16.2f} %  {100 * error:18.2f} %  {100 * lost:18.1f} %")
    for name, bits in report.bits_per_byte.items():
        console.print(f"{name:15}  {bits:.4f} bits per byte")
    console.print(f"{output}: {_bytes(output) / 1e6:.2f} MB of tensors; each layer is in {output / 'merging.json'}")


def _read(text: Path | None) -> str | None:
    try:
        return None if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ThriftyError(
            f"[pack] --text must be a UTF-8 file; {text} is not ({problem}); check the path"
        ) from problem


def pack_folder(model: Path, output: Path, dtype: str = "bfloat16", overwrite: bool = False) -> None:
    """Write the packed form of a trained folder: codes and scales of the training forward, bit for bit.

    Torch computes the scales, as it did in training: numpy adds in another order, and a mean that differs in its last
    bit can move a code. dtype: of the dense tensors, which are all those of a
    model without low-bit linears. Raises ThriftyError where the folder is no model, `output` exists
    and may not be replaced, or the disk is full; `output` is written whole or not at all.
    """
    if dtype not in DTYPES:
        raise ThriftyError(f"[pack] dtype must be one of {', '.join(DTYPES)}; got '{dtype}'")
    from thrifty.checkpoint import atomic_folder, open_folder
    from thrifty.checkpoint.config import read_json
    from thrifty.convert.transformers import copy_texts, to_transformers

    # Refuses what is no such model before torch is imported.
    opened = open_folder(model)
    if output.exists() and output.resolve() == model.resolve():
        raise ThriftyError(f"[pack] the packed copy needs a folder of its own; got {output}; choose another name")
    if opened.config.latent_scale == "float32" and opened.config.storage == "latent":
        # transformers trained it, with scales that are rounded to nothing.
        to_transformers(opened, output, dtype=dtype, overwrite=overwrite)
        return
    import torch

    from thrifty import models

    # The other names stand for what plain transformers computes the same from, which shows by itself.
    families = {"cheems": models.CheemsForCausalLM, "matmulfree": models.MatMulFreeForCausalLM}
    family = families.get(read_json(model / "config.json")["model_type"], models.ThriftyForCausalLM)
    with atomic_folder(output, overwrite) as folder, _without_bars():
        loaded = family.from_pretrained(model, dtype=torch.float32)
        models.save_packed(loaded, folder, getattr(torch, dtype))
        copy_texts(opened, folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws a bar for every file, of one file too."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
