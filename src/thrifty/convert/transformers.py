"""Packed folders in the two conventions of transformers, tensor by tensor, codes and scales bit for bit."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from thrifty import native
from thrifty.checkpoint.atomic import atomic_folder
from thrifty.checkpoint.config import config_of
from thrifty.checkpoint.folder import TEXT_FILES, Folder, check_tensors, holds_codes, reciprocal
from thrifty.checkpoint.names import EMBEDDING, all_linears, expected_tensors, linear_shapes
from thrifty.checkpoint.safetensors import Pending, Tensor, save_safetensors
from thrifty.checkpoint.transformers_config import biased, transformers_config
from thrifty.convert.report import Conversion, Written, opened, refuse_onto_itself
from thrifty.errors import ThriftyError
from thrifty.spec import ROW_BLOCK, round_bf16

#: What a folder of packed weights can be: transformers' two layers, whose scales multiply and divide.
LINEAR_CLASSES = ("autobitlinear", "bitlinear")
#: Dtypes of dense tensors, as torch and as safetensors call them.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def to_transformers(
    source: Folder | str | Path,
    output: str | Path,
    linear_class: str = "autobitlinear",
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    written: Written = lambda _: None,
) -> Conversion:
    """Write a packed folder: codes at two bits, scales that multiply ("autobitlinear") or divide ("bitlinear").

    Plain transformers loads it where it has a model that computes the same; others, those of this package. Latent
    weights are quantised as their own forward pass does it. dtype: of dense tensors, a key of `DTYPES`; None leaves
    them as they are, or where they differ takes one that holds them all. written: told the name of each tensor once it
    is written.
    source: a path, a hub id, or what `thrifty.checkpoint.open_model` gives.
    Raises ThriftyError where the model has no ternary linears, or linear_class would compute something else.
    """
    source, output = opened(source), Path(output)
    if linear_class not in LINEAR_CLASSES:
        raise ThriftyError(f"[convert] linear_class must be one of {', '.join(LINEAR_CLASSES)}; got '{linear_class}'")
    if dtype is not None and dtype not in DTYPES:
        raise ThriftyError(f"[convert] dtype must be one of {', '.join(DTYPES)}; got '{dtype}'")
    refuse_onto_itself(source, output)
    fields = _fields(source, linear_class)
    # transformers' loader takes the dtype to compute in from here, and mixes two where tensors have others.
    fields["dtype"] = dtype or _common_dtype(source)
    report = Conversion(output)
    tensors = dict(_packed_tensors(source, linear_class, DTYPES[fields["dtype"]], report))
    check_tensors(output, tensors, config_of(output / "config.json", fields))

    def done(name: str) -> None:
        if name in source.tensors:
            source.tensors[name].release()
        written(name)

    with atomic_folder(output, overwrite) as folder:
        save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"} | source.origin(), done)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        copy_texts(source, folder)
    return report


def copy_texts(source: Folder, folder: Path) -> None:
    """Write what a model needs beside tensors and config to read and write text; what is there stays."""
    for name in TEXT_FILES:
        if source.texts is not None and name in source.texts and not (folder / name).exists():
            (folder / name).write_text(source.texts[name], encoding="utf-8")
        for file in source.path.glob(name) if source.texts is None else ():
            copy = folder / file.relative_to(source.path)
            if file.is_file() and not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _fields(source: Folder, linear_class: str) -> dict:
    """config.json of the output."""
    config, given = source.config, source.json("config.json")
    if config.linear == "dense":
        raise ThriftyError(
            f"[convert] a packed folder is of ternary or binary linears; config.json says that those of {source.path} "
            "are dense; what `ternarize` trained is loaded by ThriftyForCausalLM.from_pretrained(..., linear='ternary')"
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
    source: Folder, linear_class: str, dtype: str, report: Conversion
) -> Iterator[tuple[str, Tensor | Pending]]:
    """Names and tensors of a packed folder."""
    config = source.config
    linears = all_linears(config)
    for name in expected_tensors(config):
        linear, _, last = name.rpartition(".")
        if name not in source.tensors:
            continue
        if linear not in linears or last == "bias":
            yield name, _dense(_exact(source, name), dtype, report)
        elif last == "weight":
            rows, cols = linears[linear]
            shape = ROW_BLOCK.packed_shape(rows, cols)
            report.add(source.tensors[name].dtype, "U8", int(np.prod(shape)))
            codes, scale = _linear(source, linear, rows, shape, linear_class)
            yield name, codes
            yield f"{linear}.weight_scale", scale


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


def _common_dtype(source: Folder) -> str:
    """The dtype of the dense tensors; where they differ, that of the embedding if it holds them all, else float32."""
    low_bit = {f"{linear}.{part}" for linear in all_linears(source.config) for part in ("weight", "weight_scale")}
    names = {dtype: name for name, dtype in DTYPES.items()}
    chosen = source.tensors[EMBEDDING].dtype
    if chosen not in names:
        return "float32"
    for name in source.tensors.keys() - low_bit:
        tensor = _exact(source, name)
        if tensor.dtype != chosen:
            values = tensor.float32()
            if not np.isfinite(values).all() or np.abs(values).max() > 6e4:  # float16 ends there
                return "float32"
            if not np.array_equal(Tensor.of(values, chosen).float32(), values):
                return "float32"
    return names[chosen]


def _exact(source: Folder, name: str) -> Tensor:
    """A dense tensor, or a bias as it is added."""
    scaled = source.config.bias_scaled and name.endswith(".bias")
    return Tensor.of(source.bias(name.removesuffix(".bias"))) if scaled else source.tensors[name]


def _dense(tensor: Tensor, dtype: str, report: Conversion) -> Pending:
    pending = Pending(dtype, tensor.shape, lambda: Tensor.of(tensor.float32(), dtype).data)
    report.add(tensor.dtype, dtype, pending.nbytes)
    return Pending.of(tensor) if tensor.dtype == dtype else pending
