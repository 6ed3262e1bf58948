"""A language model of bytes, of ternary layers, beside the same one of plain Keras layers.

    python examples/keras_byte_language_model.py [--short] [--width 128] [--out runs/keras_byte_language_model]

Reads Python's help topics and the documentation in its standard library byte by byte, and predicts the next one. Where
a plain block has causal attention, a ternary one (`TransformerBlockMML`) has a recurrence of as many parameters. Both
are trained with each of two learning rates. The better of each kind goes to disk and back, the ternary one packed on
the way, and the packed one writes on from a held-out text. `CategoricalGroupAccuracy` counts bytes that are right, and
groups of four that are right in all of them. Writes OUT.md, a table, and OUT.png: the training, and how much each byte
of a held-out text surprises the packed net. Runs on the backend of KERAS_BACKEND, JAX by default. Needs
`thrifty[jax,examples]`.
"""

import argparse
import math
from typing import Any

import numpy as np
from _keras import arguments, compare, curves, keras, plain_block, table, write
from matplotlib.figure import Figure

from thrifty.keras import layers
from thrifty.keras.metrics import CategoricalGroupAccuracy
from thrifty.train.corpus import builtin_corpus

HEADS, GROUP = 4, 4
COLUMNS = 64  # bytes of a line of the picture


class Windows(keras.utils.PyDataset):
    """Batches of bytes [batch, length] from anywhere in a text, and their next bytes, one-hot [batch, length, 256]."""

    def __init__(self, text: np.ndarray, steps: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.text, self.steps, self.args = text, steps, args
        self.rng = np.random.default_rng(args.seed)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self.rng.integers(0, len(self.text) - self.args.length, self.args.batch)
        return examples(self.text, starts, self.args.length)


def examples(text: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    rows = text[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return rows[:, :-1], np.eye(256, dtype=np.float32)[rows[:, 1:]]


def language_model(ternary: bool, args: argparse.Namespace, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Logits of the next byte [B, T, 256] of bytes [B, T]."""
    tokens = keras.Input((args.length,), dtype="int32")
    x: Any = layers.TokenEmbedding(args.length, 256, args.width, with_positions=True)(tokens)
    for _ in range(args.blocks):
        if ternary:
            x = layers.TransformerBlockMML(args.width, 2 * args.width, HEADS)(x)
        else:
            x = plain_block(x, 2 * args.width, HEADS)
    model = keras.Model(tokens, keras.layers.Dense(256)(x))
    metrics = [CategoricalGroupAccuracy(1, name="bytes"), CategoricalGroupAccuracy(GROUP, name="groups")]
    model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True), metrics=metrics)
    return model


def written(model: keras.Model, prompt: np.ndarray, count: int, args: argparse.Namespace) -> str:
    """The prompt and `count` more bytes, drawn at temperature 0.7."""
    rng, text = np.random.default_rng(args.seed), prompt.tolist()
    for _ in range(count):
        seen = text[-args.length :]
        tokens = np.zeros((1, args.length), np.int32)  # zeros at the end are not seen from before it
        tokens[0, : len(seen)] = seen
        logits = np.asarray(model.predict_on_batch(tokens))[0, len(seen) - 1] / 0.7
        weights = np.exp(logits - logits.max())
        text.append(int(rng.choice(256, p=weights / weights.sum())))
    return bytes(text).decode(errors="replace")


def surprises(axes: Any, model: keras.Model, text: np.ndarray, args: argparse.Namespace) -> None:
    """A text, each byte as red as it was unlikely."""
    tokens, _ = examples(text, np.array([0]), args.length)
    logits = model.predict(tokens, verbose=0)[0]
    logits = logits - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) - logits.max()
    bits = -logits[np.arange(args.length), text[1 : args.length + 1]] / math.log(2)
    grid = np.full(-(-args.length // COLUMNS) * COLUMNS, np.nan)
    grid[: args.length] = bits
    axes.imshow(grid.reshape(-1, COLUMNS), cmap="Reds", vmin=0, vmax=12, aspect="auto")
    for i, byte in enumerate(text[1 : args.length + 1].tolist()):
        shown = chr(byte) if 32 <= byte < 127 else "·"
        axes.text(i % COLUMNS, i // COLUMNS, shown, ha="center", va="center", family="monospace", fontsize=8)
    axes.set(xticks=[], yticks=[], title="held-out text, each byte as red as it surprises the packed net")


def scored(model: keras.Model, x: np.ndarray, y: np.ndarray) -> dict[str, str]:
    """Bits a byte, and the shares of bytes and of groups that are right, of a net as it was loaded."""
    logits = model.predict(x, verbose=0)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)(y, logits)
    scores = {"test_bits_a_byte": float(loss) / math.log(2)}
    for name, group in (("bytes_right", 1), (f"groups_of_{GROUP}_right", GROUP)):
        metric = CategoricalGroupAccuracy(group)
        metric.update_state(y, logits)
        scores[name] = float(metric.result())
    return {name: f"{score:.3f}" for name, score in scores.items()}


def main() -> None:
    args = arguments(
        __doc__,
        "keras_byte_language_model",
        [3e-3, 1e-2],
        epochs=10,
        steps=60,
        batch=16,
        length=128,
        width=128,
        blocks=2,
    )
    if args.short:
        args.steps, args.batch, args.length, args.width = 2, 2, 32, 32
    corpus = builtin_corpus()
    documents = [document for part in corpus.parts if part.name != "code" for document in part.documents]
    text, heldout = (np.frombuffer(one.encode(), np.uint8) for one in ("\n".join(documents), corpus.heldout))
    chosen_by, test = np.split(heldout, 2)
    validation, (x, y) = (
        examples(part, np.arange(0, len(part) - args.length, 4 * args.length), args.length)
        for part in (chosen_by, test)
    )
    builds = {
        "plain": lambda optimizer: language_model(False, args, optimizer),
        "ternary": lambda optimizer: language_model(True, args, optimizer),
    }
    data = {"x": Windows(text, args.steps, args), "validation_data": validation}
    nets = compare(builds, data, args.steps, x[:8], args)
    scores = [scored(net.model, x, y) for net in nets]
    sample = written(nets[-1].model, test[: args.length // 2], 4 if args.short else 300, args)
    print(f"\nThe packed net goes on after {args.length // 2} bytes:\n{sample}")
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, right, page = figure.subplots(1, 3, width_ratios=(1, 1, 2))
    curves(loss, nets, "loss")
    curves(right, nets, "groups")
    loss.set(ylabel="nats a byte")
    right.set(ylabel=f"groups of {GROUP} bytes right")
    surprises(page, nets[-1].model, test[-args.length - 1 :], args)
    write(
        args,
        table(nets, **{name: [one[name] for one in scores] for name in scores[0]}) + f"\n```\n{sample}\n```\n",
        figure,
    )


if __name__ == "__main__":
    main()
