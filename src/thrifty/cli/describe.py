"""What a model's files say of it, whether it runs here or not."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from thrifty.checkpoint import DecoderConfig, open_folder, open_gguf, open_safetensors
from thrifty.checkpoint.config import parse_json, read_json
from thrifty.checkpoint.folder import open_tensors
from thrifty.checkpoint.gguf_model import SCALE, gguf_config
from thrifty.checkpoint.hub import resolve
from thrifty.checkpoint.safetensors import read_metadata
from thrifty.cli.inventory import KERAS_FILES, Entry, folder_entries, gguf_entries, keras_entries, layer_of, read_keras
from thrifty.errors import ThriftyError

_SCALES = {
    "multiplies": "multiply the codes (autobitlinear)",
    "divides": "divide the codes (bitlinear)",
    "latent": "follow from the weights",
}
_BLOCK_SCALES = {
    "TQ1_0": "multiply, float16 in every block of 256 weights (TQ1_0)",
    "TQ2_0": "multiply, float16 in every block of 256 weights (TQ2_0)",
    "I2_S": "multiply, float32 for every tensor (I2_S)",
}


def describe_model(model: str | Path) -> dict[str, Any]:
    """Facts of a folder, a hub id, or a .safetensors, .gguf or .keras file: what is in it, and whether it runs here.

    Raises ThriftyError where a file is absent, damaged or none of these.
    """
    path = resolve(model)
    kinds: dict[str, Callable[[Path], dict[str, Any]]] = {
        ".gguf": _gguf,
        ".keras": _keras,
        ".safetensors": _safetensors,
    }
    if path.is_file() and path.suffix not in kinds:
        raise ThriftyError(f"[info] a model is a folder or a file in {', '.join(kinds)}; got {path}; give one of those")
    describe = _folder if path.is_dir() else kinds.get(path.suffix, _folder)
    return {"path": str(path), **describe(path)}


def _folder(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path / "config.json")
    except ThriftyError:
        open_folder(path)  # says what is wrong with the path itself
        raise
    config, runs = _config(lambda: open_folder(path).config)
    tensors, named = open_tensors(path), fields.get("architectures")
    return {
        "format": f"folder of transformers, {_several(len(list(path.glob('*.safetensors'))), 'safetensors file')}",
        "architecture": str(named[0] if isinstance(named, list) and named else fields.get("model_type")),
        "runs here": runs,
        "storage": None if config is None else _storage(config),
        "scales": None if config is None or config.linear == "dense" else _SCALES[config.storage],
        "config": _plain_config(config) if config else {k: v for k, v in fields.items() if _is_scalar(v)},
        **_tokenizer(path),
        **_amounts(folder_entries(path, tensors, config)),
    }


def _safetensors(path: Path) -> dict[str, Any]:
    tensors = open_safetensors(path)
    return {
        "format": "safetensors file",
        "runs here": "no, a model is a folder with config.json in it",
        "metadata": read_metadata(path),
        **_amounts(folder_entries(path, tensors, None)),
    }


def _gguf(path: Path) -> dict[str, Any]:
    file = open_gguf(path)
    config, runs = _config(lambda: gguf_config(file))
    kinds = {block.kind for block in file.tensors.values()} & _BLOCK_SCALES.keys()
    exact = sum(key.startswith(SCALE) for key in file.metadata)
    scales = "; ".join(_BLOCK_SCALES[kind] for kind in sorted(kinds))
    if exact:
        scales += f"; {_several(exact, 'scale')} in float32 beside them"
    metadata = file.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    kind = f"{metadata.get('tokenizer.ggml.model')} ({metadata.get('tokenizer.ggml.pre', 'no pre-tokenizer named')})"
    return {
        "format": "GGUF file",
        "architecture": str(metadata.get("general.architecture")),
        **({"name": str(metadata["general.name"])} if "general.name" in metadata else {}),
        "runs here": runs,
        "storage": None if config is None else _storage(config),
        "scales": scales or None,
        "config": _plain_config(config) if config else _own_metadata(metadata),
        "tokenizer": f"{kind}, {len(tokens)} tokens" if isinstance(tokens, list) else None,
        "chat template": "tokenizer.chat_template" in metadata,
        **_amounts(gguf_entries(path, file.tensors)),
    }


def _keras(path: Path) -> dict[str, Any]:
    files = read_keras(path)
    missing = next((name for name in KERAS_FILES if name not in files), None)
    if missing is not None:
        raise ThriftyError(f"[info] a .keras file must hold {missing}; {path} lacks it; save it again")
    texts = {name: files[name].decode(errors="replace") for name in ("config.json", "metadata.json")}
    config, metadata = (parse_json(path / name, text) for name, text in texts.items())
    classes: dict[str, int] = {}
    for name in _classes(config):
        classes[name] = classes.get(name, 0) + 1
    facts: dict[str, Any] = {
        "format": f"Keras file (keras {metadata.get('keras_version')})",
        "architecture": str(config.get("class_name")),
        "runs here": "in Keras (thrifty.keras)",
        "layers": classes,
    }
    weights = files["model.weights.h5"]
    try:
        entries = list(keras_entries(path, weights))
        kinds = {entry.kind for entry in entries if entry.zeros is not None}
        storage = None if not kinds else "packed" if kinds == {"uint8"} else "latent"
        return facts | {"storage": storage} | _amounts(entries)
    except ModuleNotFoundError:
        return facts | {
            "unread": "the weights need h5py, which is not installed",
            "bytes": {},
            "total bytes": len(weights),
        }
    except ThriftyError:
        raise
    except Exception as error:  # h5py raises what its parts do
        raise ThriftyError(
            f"[info] the weights in a .keras file must be whole; {path}: {error}; save it again"
        ) from None


def _config(read: Callable[[], DecoderConfig]) -> tuple[DecoderConfig | None, str]:
    try:
        return read(), "yes"
    except ThriftyError as error:
        return None, f"no: {error}"


def _storage(config: DecoderConfig) -> str:
    return "dense" if config.linear == "dense" else "latent" if config.storage == "latent" else "packed"


def _plain_config(config: DecoderConfig) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(config).items() if value is not None and name != "storage"}
    return fields | {"mixers": list(config.mixers)}


def _own_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of an architecture."""
    own = {k: v.item() if hasattr(v, "item") else v for k, v in metadata.items() if not hasattr(v, "__len__")}
    return {k: v for k, v in own.items() if _is_scalar(v) and not k.startswith("tokenizer.")}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _tokenizer(path: Path) -> dict[str, Any]:
    """Of a folder."""
    facts: dict[str, Any] = {"tokenizer": None}
    if (path / "tokenizer.json").is_file():
        model = read_json(path / "tokenizer.json").get("model")
        model = model if isinstance(model, dict) else {}
        vocab = model.get("vocab")
        count = len(vocab) if isinstance(vocab, dict | list) else 0
        facts["tokenizer"] = f"{model.get('type')}, {count} tokens"
    beside = path / "tokenizer_config.json"
    stored = beside.is_file() and "chat_template" in read_json(beside)
    return facts | {"chat template": stored or (path / "chat_template.jinja").is_file()}


def _amounts(entries: Iterable[Entry]) -> dict[str, Any]:
    """Bytes, types and weights by part, bits per weight, and shares of zeros."""
    parts: dict[str, dict[str, Any]] = {}
    zeros: dict[str, dict[int, float]] = {}
    low, all_zeros = 0, 0.0
    for entry in entries:
        part = parts.setdefault(entry.part, {"bytes": 0, "weights": 0, "dtypes": set()})
        part["bytes"] += entry.nbytes
        part["weights"] += entry.weights
        part["dtypes"].add(entry.kind)
        if entry.zeros is not None:
            share, (kind, layer) = entry.zeros(), layer_of(entry.name)
            shares = zeros.setdefault(kind, {})
            shares[len(shares) if layer is None else layer] = share
            low, all_zeros = low + entry.weights, all_zeros + share * entry.weights
    total = sum(part["bytes"] for part in parts.values())
    weights = sum(part["weights"] for part in parts.values())
    bits = {name: 8 * part["bytes"] / part["weights"] for name, part in parts.items() if part["weights"]}
    facts: dict[str, Any] = {
        "parameters": weights,
        "bits per weight": {"all": 8 * total / max(1, weights), **bits},
        "weights": {name: part["weights"] for name, part in parts.items()},
        "bytes": {name: part["bytes"] for name, part in parts.items()},
        "dtypes": {name: sorted(part["dtypes"]) for name, part in parts.items()},
        "total bytes": total,
    }
    layers = {kind: [share for _, share in sorted(shares.items())] for kind, shares in zeros.items()}
    return facts | ({"zeros": {"all": all_zeros / low, "layers": layers}} if low else {})


def _classes(config: Any) -> Iterable[str]:
    """Names of the classes of the layers in the config of a Keras model."""
    inner = config.get("config") if isinstance(config, dict) else None
    layers = inner.get("layers") if isinstance(inner, dict) else None
    for layer in layers if isinstance(layers, list) else []:
        yield str(layer.get("class_name") if isinstance(layer, dict) else None)
        yield from _classes(layer)


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
