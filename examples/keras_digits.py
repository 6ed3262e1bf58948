"""Handwritten digits by a net of ternary layers, beside the same net of plain Keras layers.

    python examples/keras_digits.py [--short] [--units 256] [--out runs/keras_digits]

Trains both on the 8 x 8 digits of scikit-learn with each of two learning rates. The better of each kind goes to disk
and back, the ternary one packed on the way. Writes OUT.md, a table, and OUT.png: the training, what the packed net
confuses, and digits that it misreads. Runs on the backend of KERAS_BACKEND, JAX by default. Needs
`thrifty[jax,examples]`.
"""

from typing import Any

from _keras import arguments, keras, read_digits

from thrifty.keras import layers


def ternary(units: int) -> list[Any]:
    return [layers.DenseMML(units, activation="relu") for _ in range(3)]


def plain(units: int) -> list[Any]:
    """A norm and a product, which a ternary layer has inside."""
    norm, dense = keras.layers.RMSNormalization, keras.layers.Dense
    return [layer for _ in range(3) for layer in (norm(), dense(units, activation="relu"))]


def classifier(hidden: list[Any], optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Logits of images [8, 8]; the last layer is plain, as what ternary layers answer is coarse."""
    model = keras.Sequential([keras.Input((8, 8)), keras.layers.Flatten(), *hidden, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def main() -> None:
    args = arguments(__doc__, "keras_digits", [1e-3, 4e-3], epochs=40, batch=32, units=256)
    builds = {
        "plain": lambda optimizer: classifier(plain(args.units), optimizer),
        "ternary": lambda optimizer: classifier(ternary(args.units), optimizer),
    }
    read_digits(builds, args)


if __name__ == "__main__":
    main()
