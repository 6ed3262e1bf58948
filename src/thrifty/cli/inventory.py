"""What the tensors of a file are: a list of entries, whatever the file, and what of their codes is zero."""

import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.checkpoint import DecoderConfig, Tensor
from thrifty.checkpoint.families import our_name
from thrifty.checkpoint.gguf import Block
from thrifty.checkpoint.names import GATE_BOUNDS
from thrifty.errors import ThriftyError
from thrifty.spec import GGUF_TERNARY, ROW_BLOCK

#: Parts of a model, and what their tensors' names hold.
PARTS = {
    "embedding": ("embed_tokens", "token_embd", "word_embed", "embeddings.", "wte."),
    "head": ("lm_head", "output.weight"),
}
NORMS = ("norm", "layer_norm", "_ln.", "ln_")
#: What a .keras file has in it.
KERAS_FILES = ("config.json", "metadata.json", "model.weights.h5")
#: Weights of a latent matrix that are looked at to tell how many of its codes will be zero.
SAMPLE = 1 << 18
_PIECE = 1 << 20
_LOW = np.uint64(0x5555_5555_5555_5555)


@dataclass(frozen=True)
class Entry:
    """A tensor."""

    name: str
    #: Its dtype in the file.
    kind: str
    nbytes: int
    #: Numbers of the model that it holds; none in what belongs to another tensor.
    weights: int
    part: str
    #: Share of its codes that is zero, where it has codes or will have some.
    zeros: Callable[[], float] | None = None


def folder_entries(path: Path, tensors: Mapping[str, Tensor], config: DecoderConfig | None) -> Iterator[Entry]:
    """Tensors of safetensors files. config: what is known of the model, None for nothing."""
    latent = config is not None and config.storage == "latent" and config.linear == "ternary"
    dense = config is None or (config.storage == "latent" and config.linear == "dense")
    low_bit = "ternary linears" if config is None else f"{config.linear} linears"
    for name, tensor in tensors.items():
        packed = tensor.dtype == "U8" and f"{name}_scale" in tensors
        linear = name.removesuffix("_scale")
        if packed or (name != linear and linear in tensors):
            weights = ROW_BLOCK.codes_per_byte * tensor.data.size if packed else 0
            zeros = _of_bytes(path, name, tensor.data) if packed else None
            yield Entry(name, tensor.dtype, tensor.data.nbytes, weights, low_bit, zeros)
            continue
        ours = name if config is None else our_name(config.family, name) or name
        part = part_of(ours, len(tensor.shape), "dense linears" if dense else low_bit)
        part = "others" if ours == GATE_BOUNDS else part
        zeros = _of_latent(tensor) if latent and part == low_bit else None
        yield Entry(name, tensor.dtype, tensor.data.nbytes, tensor.data.size, part, zeros)


def gguf_entries(path: Path, tensors: Mapping[str, Block]) -> Iterator[Entry]:
    """Tensors of a GGUF file."""
    for name, block in tensors.items():
        ternary = block.kind in GGUF_TERNARY
        part = "ternary linears" if ternary else part_of(name, len(block.shape), "dense linears")
        zeros = _of_blocks(path, name, block) if ternary else None
        yield Entry(name, block.kind, block.data.nbytes, int(np.prod(block.shape)), part, zeros)


def keras_entries(path: Path, weights: bytes) -> Iterator[Entry]:
    """Variables of a .keras file, by the bytes of the HDF5 file in it. Needs h5py."""
    import h5py

    found: list[tuple[str, Any]] = []
    with h5py.File(io.BytesIO(weights)) as file:
        file.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
        for name, item in found:
            array, folder = np.asarray(item), name.rpartition("/")[0]
            if not name.rpartition("/")[2].startswith("kernel_"):
                # Those of Keras' own layers have numbers for names.
                latent = name.endswith("/kernel") and array.ndim == 2 and array.dtype == np.float32
                part = "ternary layers" if latent else part_of(name, array.ndim, "dense layers")
                zeros = _of_latent(Tensor("F32", array)) if latent else None
                yield Entry(name, str(array.dtype), array.nbytes, array.size, part, zeros)
                continue
            packed = name.endswith("kernel_packed")
            shape = tuple(np.asarray(file[f"{folder}/kernel_shape"]).tolist())
            zeros = _of_base3(path, name, array, shape) if packed else None
            size = int(np.prod(shape)) if packed else 0
            yield Entry(name, str(array.dtype), array.nbytes, size, "ternary layers", zeros)


def part_of(name: str, ndim: int, matrices: str) -> str:
    """The part of a model that a tensor belongs to; `matrices` is what linears are called."""
    if ndim < 2:
        return "norms" if any(mark in name for mark in NORMS) or name.endswith("gain") else "others"
    for part, marks in PARTS.items():
        if any(mark in name for mark in marks):
            return part
    return "experts" if re.search(r"(down|up)_embed", name) else matrices


def layer_of(name: str) -> tuple[str, int | None]:
    """What a tensor is called within its layer, and the number of the layer."""
    if "/vars/" in name:
        return re.sub(r"_\d+(?=/|$)", "", name.partition("/vars/")[0]).removeprefix("layers/"), None
    match = re.search(r"(?:^|\.)(?:layers|layer|blk|blocks|h)\.(\d+)\.(.+?)(?:\.weight)?$", name)
    return (match[2], int(match[1])) if match else (name.removesuffix(".weight"), None)


def read_keras(path: Path) -> dict[str, bytes]:
    """Config, metadata and weights in a .keras file, by their names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
            return {name: archive.read(name) for name in KERAS_FILES if name in there}
    except Exception as error:  # zipfile raises what its parts do
        raise ThriftyError(f"[info] a .keras file must be a whole archive; {path}: {error}; save it again") from error


def _of_bytes(path: Path, name: str, data: np.ndarray) -> Callable[[], float]:
    def share() -> float:
        zeros = 0
        flat = np.ascontiguousarray(data).reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            # What fills up the last word are bytes of codes -1.
            words = np.pad(piece, (0, -piece.size % 8)).view(np.uint64) if piece.size % 8 else piece.view(np.uint64)
            if (words & (words >> np.uint64(1)) & _LOW).any():
                raise ThriftyError(
                    f"[checkpoint] weight codes are 0, 1 and 2; '{name}' of {path} has 3; download it again"
                )
            zeros += int(np.bitwise_count(words & _LOW).sum(dtype=np.int64))
        return zeros / max(1, ROW_BLOCK.codes_per_byte * flat.size)

    return share


def _of_latent(tensor: Tensor) -> Callable[[], float]:
    def share() -> float:
        flat = tensor.data.reshape(-1)
        step = max(1, flat.size // SAMPLE)
        values = np.abs(Tensor(tensor.dtype, flat[::step]).float32())
        return float((values <= values.mean() / 2).mean())

    return share


def _of_blocks(path: Path, name: str, block: Block) -> Callable[[], float]:
    def share() -> float:
        from thrifty import native

        rows = int(np.prod(block.shape[:-1]))
        if rows * block.shape[-1] == 0:
            return 0.0  # an empty tensor has no blocks
        try:
            codes, _ = native.gguf_decode(block.kind, block.data, rows, block.shape[-1])
        except ThriftyError as error:
            raise ThriftyError(f"{error}; tensor '{name}' of {path}") from None
        return np.count_nonzero(codes == 0) / codes.size

    return share


def _of_base3(path: Path, name: str, packed: np.ndarray, shape: tuple[int, int]) -> Callable[[], float]:
    def share() -> float:
        from thrifty.checkpoint import base3

        try:
            codes = base3.decode(packed, shape)
        except ThriftyError as error:
            raise ThriftyError(f"{error}; variable '{name}' of {path}") from None
        return np.count_nonzero(codes == 0) / codes.size

    return share
