"""A vision transformer of ternary layers reads digits, beside the same one of plain Keras layers.

    python examples/keras_vision_transformer.py [--short] [--width 64] [--out runs/keras_vision_transformer]

The 8 x 8 digits of scikit-learn as 16 patches of 2 x 2. Where a plain block has causal attention, a ternary one
(`TransformerBlockMML`) has a recurrence of as many parameters. Both are trained with each of two learning rates. The
better of each kind goes to disk and back, the ternary one packed on the way. Writes OUT.md, a table, and OUT.png: the
training, what the packed net confuses, and digits that it misreads. Runs on the backend of KERAS_BACKEND, JAX by
default. Needs `thrifty[jax,examples]`.
"""

import argparse

from _keras import arguments, keras, plain_block, read_digits

from thrifty.keras import layers

HEADS = 4


def transformer(ternary: bool, args: argparse.Namespace, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Logits of images [8, 8]."""
    images = keras.Input((8, 8))
    patches = layers.Patches(2)(keras.layers.Reshape((8, 8, 1))(images))
    x = layers.PatchEmbedding(16, args.width, use_mml=ternary, with_positions=True)(patches)
    for _ in range(args.blocks):
        if ternary:
            x = layers.TransformerBlockMML(args.width, 2 * args.width, HEADS)(x)
        else:
            x = plain_block(x, 2 * args.width, HEADS)
    logits = keras.layers.Dense(10)(keras.layers.GlobalAveragePooling1D()(x))
    model = keras.Model(images, logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def main() -> None:
    args = arguments(__doc__, "keras_vision_transformer", [3e-3, 1e-2], epochs=40, batch=32, width=64, blocks=2)
    builds = {
        "plain": lambda optimizer: transformer(False, args, optimizer),
        "ternary": lambda optimizer: transformer(True, args, optimizer),
    }
    read_digits(builds, args)


if __name__ == "__main__":
    main()
