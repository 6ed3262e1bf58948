"""Files as Keras-MML 0.1.1 writes them, by its description: one bit after the other, and slow."""

import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np


def encode_ternary(codes: np.ndarray) -> np.ndarray:
    """The bytes of ternary codes: a header and a body of "0", "10" and "11", zeros up to a whole byte."""
    values = np.asarray(codes).reshape(-1).tolist()
    order = [value for value, _ in Counter(values).most_common()]  # ties: the first seen first
    order += [value for value in (0, 1, -1) if value not in order]
    bits = "".join({0: "0", 1: "10", -1: "11"}[value] for value in order[:2])
    bits += "".join(dict(zip(order, ("0", "10", "11"), strict=True))[value] for value in values)
    return np.packbits(np.frombuffer(bits.encode(), np.uint8) - ord("0"))


def dense_groups(path: str, codes: np.ndarray, scale: float, gain: np.ndarray, bias: np.ndarray | None = None) -> dict:
    """The groups of one DenseMML: codes [d, units], the scale g that divides, the gain of the norm, and a bias."""
    kernel = {
        "kernel_encoded": encode_ternary(codes),
        "kernel_shape": np.array(codes.shape, np.int64),
        "kernel_scale": np.float32(scale),
    }
    own = kernel if bias is None else kernel | {"bias": np.float32(bias)}
    return {path: own, f"{path}/_activation_norm": {"0": np.float32(gain)}}


def write_weights(file: Any, groups: dict[str, dict[str, Any]]) -> None:
    """A weights file of Keras: arrays of each path below `vars`."""
    with h5py.File(file, "w") as weights:
        for path, arrays in groups.items():
            for name, value in arrays.items():
                weights[f"{path}/vars/{name}"] = value


def write_archive(file: Path, config: dict[str, Any], groups: dict[str, dict[str, Any]]) -> None:
    """A `.keras` archive."""
    weights = io.BytesIO()
    write_weights(weights, groups)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.6.0", "date_saved": "2025-08-15@00:00:00"}))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getvalue())


def sequential(input_shape: list[int], *layers: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The config of a compiled Sequential of layers (class name, arguments that were given), as Keras 3.6 writes it."""
    shape = [None, *input_shape]
    dtype = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": None}
    inputs = {"batch_shape": shape, "dtype": "float32", "sparse": False, "name": "input_layer"}
    configs = [{"module": "keras.layers", "class_name": "InputLayer", "config": inputs, "registered_name": None}]
    for number, (name, arguments) in enumerate(layers):
        ours = name in MODULES
        configs.append(
            {
                "module": f"keras_mml.layers.{MODULES[name]}" if ours else "keras.layers",
                "class_name": name,
                "config": {"name": f"layer_{number}", "trainable": True, "dtype": dtype, **arguments},
                "registered_name": f"keras_mml>{name}" if ours else None,
            }
        )
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {
            "name": "sequential",
            "trainable": True,
            "dtype": dtype,
            "layers": configs,
            "build_input_shape": shape,
        },
        "registered_name": None,
        "build_config": {"input_shape": shape},
        "compile_config": {"optimizer": "rmsprop", "loss": "mse", "loss_weights": None, "metrics": None},
    }


#: Where the layers are defined.
MODULES = {
    "DenseMML": "core.dense",
    "RMSNorm": "normalizations.rms_norm",
    "SwiGLUMML": "activations.glu",
    "GRUMML": "recurrent.gru",
    "LRUMML": "recurrent.lru",
    "AttentionMML": "transformer.attention",
    "TransformerBlockMML": "transformer.transformer_block",
    "PatchEmbedding": "core.embeddings",
    "Unheard": "core.dense",
}
