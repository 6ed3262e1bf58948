"""An autoencoder of ternary layers, beside the same one of plain Keras layers.

    python examples/keras_autoencoder.py [--short] [--units 256] [--code 12] [--out runs/keras_autoencoder]

Squeezes the 8 x 8 digits of scikit-learn through CODE numbers and draws them again. Both nets are trained with each of
two learning rates. The better of each kind goes to disk and back, the ternary one packed on the way. Writes OUT.md, a
table, and OUT.png: the training, and digits as each net draws them. Runs on the backend of KERAS_BACKEND, JAX by
default. Needs `thrifty[jax,examples]`.
"""

import argparse
from typing import Any

import numpy as np
from _keras import arguments, compare, curves, digits, keras, table, write
from matplotlib.figure import Figure

from thrifty.keras import layers


def ternary(units: int, activation: str | None) -> list[Any]:
    return [layers.DenseMML(units, activation=activation)]


def plain(units: int, activation: str | None) -> list[Any]:
    """A norm and a product, which a ternary layer has inside."""
    return [keras.layers.RMSNormalization(), keras.layers.Dense(units, activation=activation)]


def autoencoder(dense: Any, args: argparse.Namespace, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Images [8, 8] -> the same; the last layer is plain, as what ternary layers answer is coarse."""
    sizes = [(args.units, "relu"), (args.units, "relu"), (args.code, None), (args.units, "relu"), (args.units, "relu")]
    hidden = [layer for units, activation in sizes for layer in dense(units, activation)]
    last = [keras.layers.Dense(64, activation="sigmoid"), keras.layers.Reshape((8, 8))]
    model = keras.Sequential([keras.Input((8, 8)), keras.layers.Flatten(), *hidden, *last])
    model.compile(optimizer, "mse")
    return model


def main() -> None:
    args = arguments(__doc__, "keras_autoencoder", [1e-3, 4e-3], epochs=100, batch=32, units=256, code=12)
    (x, _), (others, _), (images, labels) = digits(args)
    builds = {
        "plain": lambda optimizer: autoencoder(plain, args, optimizer),
        "ternary": lambda optimizer: autoencoder(ternary, args, optimizer),
    }
    data = {"x": x, "y": x, "batch_size": args.batch, "validation_data": (others, others)}
    nets = compare(builds, data, -(-len(x) // args.batch), images, args)
    drawn = [net.model.predict(images, verbose=0) for net in nets]
    figure = Figure(figsize=(13, 4), layout="constrained")
    training, pictures = figure.subfigures(1, 2, width_ratios=(1, 2))
    axes = training.subplots()
    curves(axes, nets, "loss")
    axes.set(yscale="log", ylabel="mean squared error")
    rows = {"digit": images} | {net.name: one for net, one in zip(nets, drawn, strict=True)}
    shown = [int(np.argmax(labels == digit)) for digit in range(10)]
    for line, (name, row) in zip(pictures.subplots(3, 10), rows.items(), strict=True):
        line[0].set_title(name, loc="left")
        for place, i in zip(line, shown, strict=True):
            place.imshow(row[i], cmap="gray_r", vmin=0, vmax=1)
            place.axis("off")
    write(args, table(nets, test_MSE=[f"{np.square(one - images).mean():.5f}" for one in drawn]), figure)


if __name__ == "__main__":
    main()
