"""A time series forecast by recurrences of ternary layers, beside Keras' GRU.

    python examples/keras_time_series.py [--short] [--units 64] [--out runs/keras_time_series]

The series is made here: hourly load of a town by day, week and weather, in MW, a year and a half of it. Two layers read
48 hours of load, weather and calendar and forecast the load of the next 24. A ternary layer looks at the direction of
its inputs and not at their length (it begins with a norm), so one of them is always 1: against it, magnitudes show.

`GRUMML`, `LRUMML` and `keras.layers.GRU` are trained with each of two learning rates. The better of each kind goes to
disk and back, the ternary ones packed on the way. Writes OUT.md, a table, and OUT.png: the training, and a week of
forecasts. Runs on the backend of KERAS_BACKEND, JAX by default. Needs `thrifty[jax,examples]`.
"""

import argparse
from typing import Any

import numpy as np
from _keras import arguments, compare, curves, keras, table, write
from matplotlib.figure import Figure

from thrifty.keras import layers

HOURS, AHEAD = 48, 24


def series(hours: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Load in MW [hours], and features [hours, 7]: load and temperature, scaled, hour and weekday as angles, and 1."""
    rng = np.random.default_rng(seed)
    t = np.arange(hours)
    day, week = 2 * np.pi * t / 24, 2 * np.pi * t / 168

    def wander(keep: float, size: float) -> np.ndarray:
        steps, level = rng.normal(0, size, hours), 0.0
        return np.array([level := keep * level + step for step in steps])

    warmth = 12 - 10 * np.cos(2 * np.pi * t / 8766) - 4 * np.cos(day - 0.5) + wander(0.99, 0.5)
    workday = (t // 24 % 7 < 5).astype(float)
    shape = (1 - 0.35 * np.cos(day) - 0.2 * np.cos(2 * day + 0.6)) * (0.75 + 0.25 * workday)
    load = 40 * shape + 1.2 * np.abs(warmth - 16) + wander(0.9, 0.8) + rng.normal(0, 0.5, hours)
    calendar = [np.sin(day), np.cos(day), np.sin(week), np.cos(week)]
    features = np.stack([load / 25 - 2, warmth / 10 - 1, *calendar, np.ones(hours)], axis=-1)
    return load.astype(np.float32), features.astype(np.float32)


def windows(load: np.ndarray, features: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Hours to read [n, HOURS, 7], and how the load of the next AHEAD differs from that of the last day [n, AHEAD]."""
    starts = np.arange(0, len(load) - HOURS - AHEAD + 1, every)
    x = features[starts[:, None] + np.arange(HOURS)]
    ahead = starts[:, None] + HOURS + np.arange(AHEAD)
    return x, (load[ahead] - load[ahead - 24]) / 10


def forecaster(layer: Any, args: argparse.Namespace, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((HOURS, 7)), layer(return_sequences=True), layer(), keras.layers.Dense(AHEAD)]
    )
    model.compile(optimizer, "mse")
    return model


def main() -> None:
    args = arguments(__doc__, "keras_time_series", [1e-3, 4e-3], epochs=12, batch=64, units=64, hours=13_000)
    if args.short:
        args.hours = 1000
    load, features = series(args.hours, args.seed)
    cuts = [int(share * args.hours) for share in (0.7, 0.85)]
    parts = list(zip(np.split(load, cuts), np.split(features, cuts), strict=True))
    (x, y), validation, (probe, answers) = (windows(*part, every) for part, every in zip(parts, (2, 1, 1), strict=True))
    kinds = {
        "GRU": lambda **kw: keras.layers.GRU(args.units, **kw),
        "GRUMML": lambda **kw: layers.GRUMML(args.units, **kw),
        "LRUMML": lambda **kw: layers.LRUMML(args.units, args.units, **kw),
    }
    builds = {name: lambda optimizer, kind=kind: forecaster(kind, args, optimizer) for name, kind in kinds.items()}
    data = {"x": x, "y": y, "batch_size": args.batch, "validation_data": validation}
    nets = compare(builds, data, -(-len(x) // args.batch), probe, args)
    found = [net.model.predict(probe, verbose=0) for net in nets]
    errors = [10 * np.sqrt(np.square(one - answers).mean()) for one in found]
    print(f"as the day before: {10 * np.sqrt(np.square(answers).mean()):.2f} MW")

    figure = Figure(figsize=(13, 4), layout="constrained")
    training, week = figure.subplots(1, 2, width_ratios=(1, 2))
    curves(training, nets, "loss")
    training.set(yscale="log", ylabel="mean squared error (100 MW²)")
    truth = parts[-1][0]
    hours = np.arange(HOURS, min(HOURS + 168, len(truth) - AHEAD))
    week.plot(hours - HOURS, truth[hours], "k", label="truth")
    for net, one in zip(nets, found, strict=True):
        # A forecast is made at each midnight, for the day that begins.
        days = one[: len(hours) : AHEAD].reshape(-1)[: len(hours)]
        week.plot(hours - HOURS, 10 * days + truth[hours - 24], label=net.name)
    week.set(xlabel="hour", ylabel="load (MW), forecast a day at a time")
    week.legend()
    write(args, table(nets, test_RMSE_in_MW=[f"{error:.2f}" for error in errors]), figure)


if __name__ == "__main__":
    main()
