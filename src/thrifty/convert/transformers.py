"""Packed folders in the two conventions of transformers, tensor by tensor, codes and scales bit for bit."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from thrifty import native
from thrifty.checkpoint.atomic import atomic_folder
from thrifty.checkpoint.folder import Folder, holds_codes, reciprocal
from thrifty.checkpoint.names import EMBEDDING, expected_tensors, linear_shapes
from thrifty.checkpoint.safetensors import DTYPES, Pending, Tensor, save_safetensors
from thrifty.checkpoint.transformers_config import biased, transformers_config
from thrifty.convert.report import Conversion, Written
from thrifty.errors import ThriftyError
from thrifty.spec import ROW_BLOCK, round_bf16

#: What a folder of packed weights can be: transformers' two layers, whose scales multiply and divide.
LINEAR_CLASSES = ("autobitlinear", "bitlinear")
#: What lies beside the tensors of a folder.
TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16"}


def to_transformers(
    source: Folder,
    output: str | Path,
    linear_class: str = "autobitlinear",
    dtype: str | None = None,
    overwrite: bool = False,
    written: Written = lambda _: None,
) -> Conversion:
    """Write a packed folder: codes at two bits, scales that multiply ("autobitlinear") or divide ("bitlinear").

    Plain transformers loads it where it has a model that computes the same; others, those of this package. Latent
    weights are quantised as their own forward pass does it. dtype: of dense tensors ("BF16", "F16", "F32"); None
    leaves each as it is. written: told the name of each tensor once it is written.
    Raises ThriftyError where the model has no ternary linears, or linear_class would compute something else.
    """
    if linear_class not in LINEAR_CLASSES:
        raise ThriftyError(f"[convert] linear_class must be one of {', '.join(LINEAR_CLASSES)}; got '{linear_class}'")
    fields = _fields(source, linear_class)
    embedding = source.tensors[EMBEDDING].dtype if dtype is None else dtype
    # transformers' loader takes the dtype to compute in from here, and mixes two where it is not that of the tensors.
    fields["dtype"] = _TORCH_NAMES.get(embedding, "float32")
    report = Conversion(Path(output))
    tensors = dict(_packed_tensors(source, linear_class, dtype, report))

    def done(name: str) -> None:
        if name in source.tensors:
            source.tensors[name].release()
        written(name)

    with atomic_folder(output, overwrite) as folder:
        save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, done)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        copy_texts(source, folder)
    return report


def copy_texts(source: Folder, folder: Path) -> None:
    """Write what a model needs beside tensors and config to read and write text."""
    for name in TEXT_FILES:
        if source.texts is None and (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
        elif source.texts is not None and name in source.texts:
            (folder / name).write_text(source.texts[name], encoding="utf-8")


def _fields(source: Folder, linear_class: str) -> dict:
    """config.json of the output."""
    config, given = source.config, source.json("config.json")
    if config.linear == "dense":
        raise ThriftyError(
            f"[convert] a packed folder is of ternary or binary linears; those of {source.path} are dense; train it "
            "with low-bit linears first (thrifty.nn.ternarize)"
        )
    fields = transformers_config(config, given)
    plain = fields is not None
    if fields is None:
        fields = {name: value for name, value in given.items() if name != "quantization_config"}
    if plain and linear_class == "autobitlinear" and biased(config):
        raise ThriftyError(
            f"[convert] transformers' AutoBitLinear scales a bias as it scales the product, so linears must have none; "
            f"{source.path} has them in {', '.join(biased(config))}; convert to bitlinear"
        )
    for linear, (rows, _) in linear_shapes(config).items():
        if plain and rows % 4:
            raise ThriftyError(
                f"[convert] transformers takes rows in fours; {linear} of {source.path} has {rows}; no packed folder "
                "of such a model is one that plain transformers loads"
            )
    quantization = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    if config.linear_norm_eps is not None:
        quantization |= {"use_rms_norm": True, "rms_norm_eps": config.linear_norm_eps}
    return {**fields, "quantization_config": quantization}


def _packed_tensors(
    source: Folder, linear_class: str, dtype: str | None, report: Conversion
) -> Iterator[tuple[str, Tensor | Pending]]:
    """Names and tensors of a packed folder."""
    config = source.config
    linears = {
        f"model.layers.{layer}.{linear}": shape
        for layer in range(config.num_hidden_layers)
        for linear, shape in linear_shapes(config, layer).items()
    }
    for name in expected_tensors(config):
        linear, _, last = name.rpartition(".")
        if linear not in linears or last == "rms_norm":
            if name in source.tensors:
                yield name, _dense(source.tensors[name], dtype, report)
        elif last == "weight":
            rows, cols = linears[linear]
            shape = ROW_BLOCK.packed_shape(rows, cols)
            report.add(source.tensors[name].dtype, "U8", int(np.prod(shape)))
            codes, scale = _linear(source, linear, rows, shape, linear_class)
            yield name, codes
            yield f"{linear}.weight_scale", scale
        elif last == "bias":
            stored = source.tensors[name]
            exact = Tensor.of(source.bias(linear)) if config.bias_scaled else stored
            yield name, _dense(exact, dtype, report)


def _linear(source: Folder, linear: str, rows: int, shape: tuple[int, ...], linear_class: str) -> Iterator[Pending]:
    """Codes and scale of a linear; a latent weight is quantised once, when its codes' turn comes."""
    scale: Future[np.float32] = Future()

    def codes() -> np.ndarray:
        try:
            stored = source.packed(linear)
            if stored is not None and not holds_codes(stored[0]):
                raise source.no_code(linear)
            codes, multiplier = source.codes(linear, rows) if stored is None else stored
        except BaseException as error:
            scale.set_exception(error)
            raise
        scale.set_result(multiplier)
        return native.pack(ROW_BLOCK.name, codes, 1) if stored is None else codes

    rounded = source.config.storage == "latent" and source.config.latent_scale == "bfloat16"
    dtype = "BF16" if rounded and linear_class == "autobitlinear" else "F32"
    if source.config.storage != "latent":
        value = _stored_scale(source.multiplier(linear), linear_class)
        dtype = "BF16" if round_bf16(value) == value else "F32"
    yield Pending("U8", shape, codes)
    yield Pending(dtype, (1,), lambda: Tensor.of(_stored_scale(scale.result(), linear_class), dtype).data)


def _stored_scale(multiplier: np.float32, linear_class: str) -> np.ndarray:
    return np.full(1, reciprocal(multiplier) if linear_class == "bitlinear" else multiplier, np.float32)


def _dense(tensor: Tensor, dtype: str | None, report: Conversion) -> Pending:
    dtype = dtype or (tensor.dtype if tensor.dtype in DTYPES else "F32")
    shape = tensor.shape
    report.add(tensor.dtype, dtype, int(np.prod(shape)) * DTYPES[dtype].itemsize)
    if tensor.dtype == dtype:
        return Pending.of(tensor)
    return Pending(dtype, shape, lambda: Tensor.of(tensor.float32(), dtype).data)
