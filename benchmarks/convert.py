"""Times `thrifty convert` on a checkpoint of 2B4T's shape, beside copying its bytes, and measures its memory.

    python benchmarks/convert.py [--shape 2b] [--folder KEPT] [--latent]

Each conversion runs in a process of its own; times are those of the whole conversion, the file synced to the disk, and
memory is the most that the process held, mapped pages included. What comes back is compared with what went in, bit for
bit. --latent writes and converts bfloat16 master weights too (4.3 GB more on the disk).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _measure import machine_line

from thrifty import native
from thrifty.checkpoint import Tensor, open_folder, open_model, open_safetensors, save_safetensors
from thrifty.checkpoint.safetensors import Pending
from thrifty.convert import to_gguf, to_transformers
from thrifty.errors import ThriftyError
from thrifty.runtime.measure import SIZES, write_random


def nbytes(model: Path) -> int:
    """Bytes of a model's tensors."""
    return (model if model.is_file() else model / "model.safetensors").stat().st_size


def convert(source: Path, output: Path, to: str) -> None:
    """A conversion, in this process; prints its seconds and its memory."""
    start = time.perf_counter()
    if to == "copy":
        with open(source / "model.safetensors", "rb") as read, open(output, "wb") as write:
            shutil.copyfileobj(read, write, 1 << 24)
            write.flush()
            os.fsync(write.fileno())
    elif to == "gguf":
        # Embeddings in bfloat16 come back as they were.
        to_gguf(open_model(source, native.gguf_decode), output, head_type="BF16", any_activation=True)
    else:
        to_transformers(open_model(source, native.gguf_decode), output, to)
    seconds = time.perf_counter() - start
    # The system's own count of the most that a process held goes on from that of the process which began it.
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": int(held.split()[1]) << 10}))


def measured(source: Path, output: Path, to: str) -> None:
    """A conversion in a process of its own, as a line of the table."""
    command = [sys.executable, __file__, "--convert", str(source), str(output), to]
    numbers = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    speed = nbytes(source) / numbers["seconds"] / 1e6
    what = f"{source.name} → {output.name}"
    print(f"{what:26} {numbers['seconds']:7.2f} s {speed:8.0f} MB/s {numbers['peak'] / 1e6:8.0f} MB")


def check_same(before: Path, after: Path) -> None:
    """Tensors of two folders are the same bits, whatever the dtype that holds them."""
    one, two = (open_safetensors(folder / "model.safetensors") for folder in (before, after))
    for name, tensor in one.items():
        # float32 holds what every dtype here does, codes too.
        if not np.array_equal(tensor.float32(), two[name].float32()):
            raise ThriftyError(f"[benchmark] what comes back must be what went in; '{name}' of {after} is not")


def write_latent(packed: Path, folder: Path) -> None:
    """Master weights in bfloat16 whose codes are those of a packed folder."""
    opened, tensors = open_folder(packed), {}
    for name, tensor in opened.tensors.items():
        linear = name.removesuffix(".weight")
        if f"{linear}.weight_scale" in opened.tensors and name != f"{linear}.weight_scale":
            rows = 4 * tensor.shape[0]

            def latent(linear: str = linear, rows: int = rows) -> np.ndarray:
                codes, scale = opened.codes(linear, rows)
                # Two thirds of the codes are not zero, so that their mean magnitude is about the scale.
                return Tensor.of(codes * np.float32(1.5 * scale), "BF16").data

            tensors[name] = Pending("BF16", (rows, tensor.shape[1]), latent)
        elif not name.endswith(".weight_scale"):
            tensors[name] = tensor
    folder.mkdir()
    save_safetensors(folder / "model.safetensors", tensors)
    fields = json.loads((packed / "config.json").read_text())
    fields["quantization_config"] |= {"quantization_mode": "online", "scale_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SIZES), default="2b")
    parser.add_argument("--folder", type=Path, help="a packed folder to convert, in place of a random one")
    parser.add_argument("--latent", action="store_true", help="master weights too")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        source, output, to = args.convert
        convert(Path(source), Path(output), to)
        return 0
    print(machine_line())
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        packed = args.folder or write_random(folder / "packed", SIZES[args.shape])
        print(f"{nbytes(packed) / 1e6:.0f} MB of a packed folder; speeds count what is read")
        measured(packed, folder / "copy", "copy")
        measured(packed, folder / "model.gguf", "gguf")
        measured(folder / "model.gguf", folder / "back", "autobitlinear")
        measured(packed, folder / "divides", "bitlinear")
        measured(folder / "divides", folder / "multiplies", "autobitlinear")
        for after in ("back", "multiplies"):
            check_same(packed, folder / after)
        print("what came back is what went in, bit for bit")
        if args.latent:
            write_latent(packed, folder / "latent")
            measured(folder / "latent", folder / "quantised", "autobitlinear")
    return 0


if __name__ == "__main__":
    sys.exit(main())
