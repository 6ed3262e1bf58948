"""GRUMML beside the same cell in keras.layers.RNN, on the backend that KERAS_BACKEND names.

    KERAS_BACKEND=jax python benchmarks/keras_recurrent.py [--units 64 256] [--steps 1024] [--batch 16]

Both have the same weights, and must give the same outputs before they are timed. Times are medians of calls taken in
turn, as Keras compiles a model by default: predictions with float kernels and with packed ones, and training steps.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from _measure import machine_line, seconds

from thrifty.keras import pack
from thrifty.keras.layers import GRUMML


def models(units: int, fully_mml: bool) -> tuple[keras.Model, keras.Model]:
    """GRUMML, and Keras' loop over a cell with its weights."""
    layer = GRUMML(units, fully_mml, return_sequences=True)
    cell = type(layer.cell).from_config(layer.cell.get_config())
    both = []
    for recurrent in (layer, keras.layers.RNN(cell, return_sequences=True)):
        model = keras.Sequential([keras.Input((None, units)), recurrent])
        model.compile("sgd", "mse")
        both.append(model)
    both[1].set_weights(both[0].get_weights())
    return both[0], both[1]


def compare(name: str, calls: tuple[Callable[[], object], Callable[[], object]], rounds: int) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 2):
        for call, taken in zip(calls, times, strict=True):
            took = seconds(call)
            if turn >= 2:
                taken.append(took)
    ours, theirs = (1e3 * float(np.median(taken)) for taken in times)
    print(f"  {name:30} GRUMML {ours:8.1f} ms   RNN {theirs:8.1f} ms   {theirs / ours:5.2f} x")


def check(one: np.ndarray, other: np.ndarray) -> None:
    # A sum in another order moves a code to its neighbour now and then.
    share = np.mean(np.abs(one - other) > 1e-4 * np.abs(other).max())
    if share > 1e-3:
        raise SystemExit(f"results differ in {share:.2%} of the entries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(machine_line())
    print(f"keras {keras.__version__} on {keras.backend.backend()}; {args.batch} sequences of {args.steps} steps")
    for units in args.units:
        rng = np.random.default_rng(units)
        x, y = (rng.standard_normal((args.batch, args.steps, units), np.float32) for _ in range(2))
        for fully_mml in (False, True):
            print(f"{units} units{', fully_mml' if fully_mml else ''}")
            both = models(units, fully_mml)
            predict = tuple(partial(m.predict_on_batch, x) for m in both)
            check(predict[0](), predict[1]())
            compare("prediction", predict, args.rounds)
            compare("training step", tuple(partial(m.train_on_batch, x, y) for m in both), args.rounds // 2)
            both[1].set_weights(both[0].get_weights())
            for model in both:
                pack(model)
            check(predict[0](), predict[1]())
            compare("prediction, packed", predict, args.rounds // 2)


if __name__ == "__main__":
    main()
