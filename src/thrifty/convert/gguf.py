"""GGUF files that llama.cpp runs."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from thrifty import native
from thrifty.checkpoint.folder import Folder, holds_codes
from thrifty.checkpoint.gguf import TensorToWrite, save_gguf
from thrifty.checkpoint.gguf_model import CONFIG, GENERATION_CONFIG, LAYER_NAMES, NAMES, SCALE, GGUFFolder, neighbours
from thrifty.checkpoint.gguf_vocabulary import vocabulary_metadata
from thrifty.checkpoint.names import EMBEDDING, HEAD, all_linears, expected_tensors
from thrifty.checkpoint.pipeline import made_in_order
from thrifty.checkpoint.safetensors import Tensor
from thrifty.checkpoint.transformers_config import biased, transformers_config
from thrifty.convert.report import Conversion, Written, opened, refuse_onto_itself
from thrifty.errors import ThriftyError
from thrifty.spec import ROW_BLOCK

#: Types of ternary weights, and llama.cpp's numbers for files of them; types of embedding and head.
WEIGHT_TYPES = {"TQ1_0": 36, "TQ2_0": 37}
HEAD_TYPES = ("Q8_0", "F16", "BF16", "F32")
#: llama.cpp's architectures by transformers' model types.
_ARCHITECTURES = {"bitnet": "bitnet", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def to_gguf(
    source: Folder | str | Path,
    output: str | Path,
    weight_type: str = "TQ2_0",
    head_type: str = "Q8_0",
    *,
    any_activation: bool = False,
    overwrite: bool = False,
    written: Written = lambda _: None,
) -> Conversion:
    """Write a GGUF file (architectures bitnet, llama, qwen2, qwen3) with vocabulary and chat template.

    weight_type: of ternary weights; a scale that their float16 does not hold is kept in the metadata as well.
    head_type: of the embedding and the output head. any_activation: write ReLU² and others too, which llama.cpp
    computes as SiLU, for builds that read `<architecture>.hidden_activation`, and for the way back. written: told the
    name of each tensor once it is written. source: a path, a hub id, or what `thrifty.checkpoint.open_model` gives.
    Raises ThriftyError where the target would compute something else from the file.
    """
    source, output = opened(source), Path(output)
    if output.suffix != ".gguf":
        raise ThriftyError(f"[convert] the name of a GGUF file ends in .gguf, by which it is known; got {output}")
    refuse_onto_itself(source, output)
    if output.exists() and not overwrite:
        raise ThriftyError(f"[convert] the output file must be new; {output} exists; choose another name or force it")
    for name, value, choices in (("weight_type", weight_type, WEIGHT_TYPES), ("head_type", head_type, HEAD_TYPES)):
        if value not in choices:
            raise ThriftyError(f"[convert] {name} must be one of {', '.join(choices)}; got '{value}'")
    fields = transformers_config(source.config, source.json("config.json"))
    architecture = _architecture(source, fields, any_activation)
    metadata = _metadata(source, architecture, fields or {}, weight_type)
    report = Conversion(output)
    vocabulary = _vocabulary(source)
    if vocabulary is None:
        report.notes.append(
            "there is no tokenizer, so the file has no vocabulary, without which few programs on llama.cpp run it"
        )
    linears = all_linears(source.config)
    exact = dict(_inexact_scales(source, list(linears)))
    if exact:
        report.notes.append(
            f"{len(exact)} of {len(linears)} scales are rounded to float16 for llama.cpp; the metadata keep them whole"
        )
    metadata |= exact | (vocabulary or {"tokenizer.ggml.model": "no_vocab"})
    tensors, ours = [], {}
    for name in expected_tensors(source.config):
        if name.endswith(".weight_scale"):
            continue
        tensor = _tensor(source, architecture, name, linears, weight_type, head_type)
        report.add(source.tensors[name].dtype, tensor.kind, tensor.nbytes)
        tensors.append(tensor)
        ours[tensor.name] = name

    def done(name: str) -> None:
        source.tensors[ours[name]].release()
        written(name)

    save_gguf(output, metadata, tensors, done)
    return report


def _inexact_scales(source: Folder, linears: list[str]) -> Iterator[tuple[str, np.float32]]:
    """Metadata for the scales that float16 does not hold."""
    scales = made_in_order(partial(source.multiplier, linear) for linear in linears)
    for linear, scale in zip(linears, scales, strict=True):
        with np.errstate(over="ignore"):
            rounded = np.float16(scale)
        if np.float32(rounded) != scale:
            yield SCALE + linear, np.float32(scale)


def _architecture(source: Folder, fields: dict[str, Any] | None, any_activation: bool) -> str:
    """The architecture of the file. Raises ThriftyError where llama.cpp computes something else from it."""
    config = source.config
    model_type = None if fields is None else fields["model_type"]
    unbiased = model_type in ("bitnet", "qwen3")
    reasons = {
        "its linears are not ternary": config.linear != "ternary",
        "it has layers that are no attention and gated feed-forward": model_type not in _ARCHITECTURES,
        "its linears have norms of their own": config.linear_norm_eps is not None,
        "its rotary frequencies are scaled": config.rope_scaling is not None,
        f"its linears have biases ({', '.join(biased(config))})": unbiased and biased(config) != [],
        "its output head is not the embedding": model_type == "bitnet" and not config.tie_word_embeddings,
        f"it has {config.hidden_act} where llama.cpp computes SiLU (any_activation writes it nevertheless)": (
            config.hidden_act != "silu" and not any_activation
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ThriftyError(
                f"[convert] no file is written from which llama.cpp would compute what {source.path} does: {reason}; "
                "run it here"
            )
    return _ARCHITECTURES[str(model_type)]


def _metadata(source: Folder, architecture: str, fields: dict[str, Any], weight_type: str) -> dict[str, Any]:
    config = source.config
    numbers = {
        "vocab_size": np.uint32(config.vocab_size),
        "context_length": np.uint32(config.max_position_embeddings),
        "embedding_length": np.uint32(config.hidden_size),
        "block_count": np.uint32(config.num_hidden_layers),
        "feed_forward_length": np.uint32(config.intermediate_size),
        "attention.head_count": np.uint32(config.num_attention_heads),
        "attention.head_count_kv": np.uint32(config.num_key_value_heads),
        "attention.key_length": np.uint32(config.head_dim),
        "attention.value_length": np.uint32(config.head_dim),
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "rope.dimension_count": np.uint32(config.head_dim),
        "rope.freq_base": np.float32(config.rope_theta),
        "hidden_activation": config.hidden_act,
    }
    generation = source.text("generation_config.json")
    return {
        "general.architecture": architecture,
        "general.name": source.path.stem,
        "general.file_type": np.uint32(WEIGHT_TYPES[weight_type]),
        "general.quantization_version": np.uint32(2),
        **{f"{architecture}.{name}": value for name, value in numbers.items()},
        **source.origin(),
        CONFIG: json.dumps(fields),
        **({} if generation is None else {GENERATION_CONFIG: generation}),
    }


def _vocabulary(source: Folder) -> dict[str, Any] | None:
    if isinstance(source, GGUFFolder):
        return source.vocabulary()
    tokenizer = source.text("tokenizer.json")
    if tokenizer is None:
        slow = [
            name for name in ("tokenizer.model", "vocab.json") if source.texts is None and (source.path / name).exists()
        ]
        if slow:
            raise ThriftyError(
                f"[convert] a vocabulary is read from tokenizer.json; {source.path} has {slow[0]} alone; load the "
                "tokenizer with transformers and save it there"
            )
        return None
    config = source.json("config.json") | source.json("generation_config.json")
    template = source.text("chat_template.jinja")
    return vocabulary_metadata(
        tokenizer, source.json("tokenizer_config.json"), config, template, source.config.vocab_size
    )


def _tensor(
    source: Folder, architecture: str, name: str, linears: dict[str, tuple[int, int]], weight_type: str, head_type: str
) -> TensorToWrite:
    """A tensor under the name it has in GGUF, made when its turn comes."""
    config, permuted = source.config, architecture == "llama"
    module, _, last = name.rpartition(".")
    if module in linears and last == "weight":
        rows, cols = linears[module]

        def ternary() -> np.ndarray:
            codes, scale = _codes(source, module, rows)
            # Two tensors are made at a time, each by a thread.
            return native.gguf_encode(weight_type, neighbours(config, permuted, module, codes), float(scale), 1)

        return TensorToWrite(_gguf_name(name), weight_type, (rows, cols), ternary)
    stored = source.tensors[name]
    if name in (EMBEDDING, HEAD):
        return TensorToWrite(_gguf_name(name), head_type, stored.shape, partial(_float_bytes, stored, head_type))

    def floats() -> np.ndarray:
        return neighbours(config, permuted, module, source.bias(module) if last == "bias" else stored.float32())

    return TensorToWrite(_gguf_name(name), "F32", stored.shape, floats)


def _codes(source: Folder, linear: str, rows: int) -> tuple[np.ndarray, np.float32]:
    stored = source.packed(linear)
    if stored is None:
        return source.codes(linear, rows)
    packed, scale = stored
    if not holds_codes(packed):
        raise source.no_code(linear)
    return native.unpack(ROW_BLOCK.name, packed, rows, packed.shape[1], 1), scale


def _float_bytes(tensor: Tensor, kind: str) -> np.ndarray:
    if kind == "Q8_0" and tensor.dtype != kind:
        stored = tensor.data if tensor.dtype in ("BF16", "F16", "F32") else tensor.float32()
        return native.quantize_q8_0(stored)
    return tensor.data if tensor.dtype == kind else Tensor.of(tensor.float32(), kind).data


def _gguf_name(name: str) -> str:
    plain = {ours: theirs for theirs, ours in NAMES.items()}
    if name in plain:
        return plain[name]
    _, _, layer, *parts, last = name.split(".")
    module = {ours: theirs for theirs, ours in LAYER_NAMES.items()}[".".join(parts)]
    return f"blk.{layer}.{module}.{last}"
