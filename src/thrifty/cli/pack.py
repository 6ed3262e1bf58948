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
"""

DTYPES = ("bfloat16", "float32")


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", show_default=False)],
    output: Annotated[Path | None, typer.Argument(help="Folder to write.", show_default="MODEL-packed")] = None,
    dtype: Annotated[str, typer.Option(help="Embedding, norms and head: bfloat16 or float32.")] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder where it exists.")] = False,
) -> None:
    """Make the small copy of a trained model: two bits per weight, or 16 where linears are dense.

    The copy runs without torch (`thrifty generate`), and plain transformers loads it where the model is a BitNet.
    """
    output = output or model.resolve().with_name(f"{model.resolve().name}-packed")
    pack_folder(model, output, dtype, overwrite=force)
    before, after = _bytes(model), _bytes(output)
    print(f"{output}: {after / 1e6:.2f} MB of tensors, {before / after:.1f} times smaller", file=sys.stderr)


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
