"""DenseMML beside Keras' Dense on the backend that KERAS_BACKEND names: predictions, training steps, memory and files.

Results are checked against the spec first. Times are medians of calls taken in turn: `predict_on_batch` of one row and
of 64, as Keras compiles a model by default, and `train_on_batch` of a layer beside `RMSNormalization` and `Dense`, both
with jit_compile=True.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py
import keras
import numpy as np
from _measure import machine_line, seconds

from thrifty import spec
from thrifty.keras import pack
from thrifty.keras.layers import DenseMML


def model(features: int, *layers: keras.layers.Layer, jit: bool | str = "auto") -> keras.Model:
    built = keras.Sequential([keras.Input((features,)), *layers])
    built.compile("sgd", "mse", jit_compile=jit)
    return built


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all in turn, after three that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            took = seconds(call)
            if turn >= 3:
                times[name].append(took)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def expected(layer: DenseMML, x: np.ndarray) -> np.ndarray:
    held = layer.packed_dense.weights
    return spec.ternary_matmul(*spec.quantize_per_token(x, held.gain), held.matrix.codes(), held.scale, held.bias)


def predictions(width: int, rounds: int) -> None:
    dense, ternary = model(width, keras.layers.Dense(width)), model(width, DenseMML(width))
    pack(ternary)
    layer = ternary.layers[0]
    held = layer.packed_dense.weights.matrix.nbytes
    print(f"kernel of {width} x {width}: {4 * width**2} bytes, packed {held}, {4 * width**2 / held:.1f} times less")
    for rows in (1, 64):
        x = np.random.default_rng(rows).standard_normal((rows, width), np.float32)
        np.testing.assert_array_equal(ternary.predict_on_batch(x), expected(layer, x))
        calls = {name: partial(m.predict_on_batch, x) for name, m in (("dense", dense), ("packed", ternary))}
        took = medians(calls, rounds)
        ratio = took["dense"] / took["packed"]
        print(f"{rows} rows: Dense {1e3 * took['dense']:.2f} ms, packed {1e3 * took['packed']:.2f} ms, {ratio:.1f} x")


def training(width: int, rows: int, rounds: int) -> None:
    dense = model(width, keras.layers.RMSNormalization(), keras.layers.Dense(width), jit=True)
    ternary = model(width, DenseMML(width), jit=True)
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((rows, width), np.float32) for _ in range(2))
    took = medians(
        {"dense": lambda: dense.train_on_batch(x, y), "ternary": lambda: ternary.train_on_batch(x, y)}, rounds
    )
    print(
        f"training step, {rows} rows of {width}: RMSNormalization and Dense {1e3 * took['dense']:.1f} ms, "
        f"DenseMML {1e3 * took['ternary']:.1f} ms, {took['ternary'] / took['dense']:.2f} x"
    )


def files(width: int) -> None:
    ternary = pack(model(width, DenseMML(width)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.keras"
        model(5, DenseMML(5)).save(file)  # imports what saving needs
        start = time.perf_counter()
        ternary.save(file)
        saved = time.perf_counter()
        loaded = keras.saving.load_model(file)
        done = time.perf_counter()
        weights = Path(folder) / "packed.weights.h5"
        loaded.save_weights(weights)
        with h5py.File(weights) as h5:
            bits = 8 * h5["layers/dense_mml/vars/kernel_packed"].size / width**2
        rest = file.stat().st_size - bits / 8 * width**2 - 8 * width
    x = np.ones((1, width), np.float32)
    np.testing.assert_array_equal(loaded.predict_on_batch(x), ternary.predict_on_batch(x))
    print(
        f"on disk {bits:.3f} bits a weight, and {rest:.0f} bytes beside kernel, bias and gain; saved at "
        f"{width**2 / 1e6 / (saved - start):.0f} M weights/s, loaded at {width**2 / 1e6 / (done - saved):.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--training", type=int, nargs=2, default=(2048, 1024), metavar=("WIDTH", "ROWS"))
    args = parser.parse_args()
    print(machine_line())
    print(f"keras {keras.__version__} on {keras.backend.backend()}")
    predictions(args.width, args.rounds)
    training(*args.training, max(5, args.rounds // 5))
    files(args.width)


if __name__ == "__main__":
    main()
