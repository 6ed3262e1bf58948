"""What the Keras examples share: ternary and plain nets trained alike, their sizes, a way to disk and back."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before Keras is imported, which the examples do from here.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from thrifty.keras import pack
from thrifty.keras.layers.core import dense_layers

#: Makes a net that is compiled with an optimizer.
Build = Callable[[keras.optimizers.Optimizer], keras.Model]


@dataclass
class Net:
    """A trained net, and what became of it on disk."""

    name: str
    #: As it was loaded in the end: packed, where it has ternary layers.
    model: keras.Model
    rate: float
    history: dict[str, list[float]]
    parameters: int
    #: Bytes of its file, and of what it multiplies by or looks up in.
    file: int
    matrices: int


def arguments(description: str | None, name: str, rates: list[float], **numbers: int) -> argparse.Namespace:
    """Options that all examples have, and those of one: names with defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--rates", type=float, nargs="+", default=rates, help="learning rates to choose from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds: see that it runs, learn nothing")
    parser.add_argument("--out", type=Path, default=Path(f"runs/{name}"), help="OUT.md and OUT.png are written")
    args = parser.parse_args()
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    if args.short:
        args.epochs, args.rates = 1, args.rates[:1]
        if "blocks" in numbers:
            args.blocks = 1
    return args


def digits(args: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images [n, 8, 8] from 0 to 1 and their digits: 1200 to train on, 200 to choose by, 397 to test with."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(data.target))
    images, labels = (data.images[order] / 16).astype(np.float32), data.target[order]
    cuts = [96, 128] if args.short else [1200, 1400]
    return list(zip(np.split(images, cuts), np.split(labels, cuts), strict=True))


def compare(
    builds: dict[str, Build], data: dict[str, Any], steps: int, probe: Any, args: argparse.Namespace
) -> list[Net]:
    """Train each net and take it to disk and back.

    data: arguments of `fit`, which takes `steps` steps an epoch; probe: inputs that both ends of the way are asked.
    """
    return [_from_disk(name, *_best(name, build, data, steps, args), probe, args.out) for name, build in builds.items()]


def _best(
    name: str, build: Build, data: dict[str, Any], steps: int, args: argparse.Namespace
) -> tuple[keras.Model, float]:
    """A net trained with the best of the learning rates, by the loss of the validation data in the end; and that rate.

    Rates rise for a twentieth of the steps and fall along a cosine.
    """
    found: list[tuple[float, keras.Model, float]] = []
    steps *= args.epochs
    warmup = max(steps // 20, 1)
    for rate in args.rates:
        keras.utils.set_random_seed(args.seed)
        schedule = keras.optimizers.schedules.CosineDecay(
            rate / 100, max(steps - warmup, 1), 0.0, warmup_target=rate, warmup_steps=warmup
        )
        model, began = build(keras.optimizers.Adam(schedule)), time.perf_counter()
        loss = model.fit(epochs=args.epochs, verbose=0, **data).history["val_loss"][-1]
        print(f"{name}: learning rate {rate:g}, {time.perf_counter() - began:.0f} s, loss {loss:.4f}", flush=True)
        found.append((loss, model, rate))
    return min(found, key=lambda one: one[0])[1:]


def _from_disk(name: str, model: keras.Model, rate: float, probe: Any, folder: Path) -> Net:
    """Save, load, pack, save, load: a net without ternary layers has nothing to pack."""
    folder.mkdir(parents=True, exist_ok=True)
    file, before = folder / f"{name}.keras", model.predict(probe, verbose=0)
    model.save(file)
    loaded = keras.saving.load_model(file, compile=False)  # without the optimizer's state
    if ternary := dense_layers(loaded):
        pack(loaded)
    loaded.save(file)
    loaded = keras.saving.load_model(file, compile=False)
    after = loaded.predict(probe, verbose=0)
    away = np.abs(after - before)
    print(
        f"{name}: saved, loaded, {'packed, ' if ternary else ''}saved and loaded; answers differ by at most "
        f"{away.max():.1e}, at the median by {np.median(away):.1e}",
        flush=True,
    )
    matrices = sum(4 * int(np.prod(weight.shape)) for weight in loaded.weights if len(weight.shape) > 1)
    matrices += sum(layer.packed_dense.weights.matrix.nbytes for layer in dense_layers(loaded))
    history = model.history.history
    return Net(name, loaded, rate, history, model.count_params(), file.stat().st_size, matrices)


def plain_block(x: Any, hidden: int, heads: int, rate: float = 0.1) -> Any:
    """`TransformerBlockMML` of plain layers: causal attention in place of its recurrence, and the same feed-forward."""
    width = x.shape[-1]
    attention = keras.layers.MultiHeadAttention(heads, width // heads)(x, x, use_causal_mask=True)
    a = keras.layers.RMSNormalization()(x + keras.layers.Dropout(rate)(attention))
    gated = keras.layers.Dense(hidden, activation="silu")(a) * keras.layers.Dense(hidden)(a)
    return keras.layers.RMSNormalization()(a + keras.layers.Dropout(rate)(keras.layers.Dense(width)(gated)))


def table(nets: Sequence[Net], **scores: Sequence[str]) -> str:
    """A line for each net: what it scores, and its sizes."""
    head = [*(name.replace("_", " ") for name in scores), "learning rate", "parameters", "float32, kB"]
    lines = [f"| net | {' | '.join([*head, '`.keras`, kB', 'matrices in memory, kB'])} |"]
    lines.append("| --- |" + " ---: |" * (len(head) + 2))
    for net, *scored in zip(nets, *scores.values(), strict=True):
        cells = [*scored, f"{net.rate:g}", str(net.parameters)]
        cells += [f"{size / 1e3:.0f}" for size in (4 * net.parameters, net.file, net.matrices)]
        lines.append(f"| {net.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curves(axes: Any, nets: Sequence[Net], quantity: str) -> None:
    """How a quantity of the training and the validation data went."""
    for color, net in enumerate(nets):
        epochs = range(1, len(net.history["loss"]) + 1)
        axes.plot(epochs, net.history[quantity], f"C{color}:")
        axes.plot(epochs, net.history[f"val_{quantity}"], f"C{color}-", label=net.name)
    axes.set(xlabel="epoch (dotted: training data)", ylabel=quantity)
    axes.legend()
    axes.grid(alpha=0.3)


def confusions(axes: Any, labels: np.ndarray, found: np.ndarray) -> None:
    """How often a digit was read as another."""
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, found), 1)
    axes.imshow(counts > 0, cmap="Blues", vmin=0, vmax=4)
    for row, column in np.argwhere(counts):
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8)
    axes.set(xlabel="read by the packed net", ylabel="digit", xticks=range(10), yticks=range(10))


def misread(figure: Any, images: np.ndarray, labels: np.ndarray, found: np.ndarray) -> None:
    """Images that were read wrong, twelve at most."""
    wrong = np.flatnonzero(labels != found)
    figure.suptitle(f"{len(wrong)} of {len(labels)} misread")
    places = figure.subplots(3, 4).ravel()
    for place in places:
        place.axis("off")
    for place, i in zip(places, wrong[:12], strict=False):
        place.imshow(images[i], cmap="gray_r")
        place.set_title(f"{labels[i]} as {found[i]}", fontsize=8)


def read_digits(builds: dict[str, Build], args: argparse.Namespace) -> None:
    """Compare nets that tell digits, and write their accuracies, confusions and what they misread."""
    from matplotlib.figure import Figure

    (x, y), validation, (images, labels) = digits(args)
    data = {"x": x, "y": y, "batch_size": args.batch, "validation_data": validation}
    nets = compare(builds, data, -(-len(x) // args.batch), images, args)
    found = [net.model.predict(images, verbose=0).argmax(-1) for net in nets]
    figure = Figure(figsize=(13, 4), layout="constrained")
    training, confused, wrong = figure.subfigures(1, 3, width_ratios=(1.2, 1, 1))
    curves(training.subplots(), nets, "accuracy")
    confusions(confused.subplots(), labels, found[-1])
    misread(wrong, images, labels, found[-1])
    write(args, table(nets, test_accuracy=[f"{(labels == one).mean():.3f}" for one in found]), figure)


def write(args: argparse.Namespace, text: str, figure: Any) -> None:
    """The table and the picture."""
    args.out.with_suffix(".md").write_text(text)
    figure.savefig(args.out.with_suffix(".png"), dpi=110)
    print(f"\n{text}\nwrote {args.out.with_suffix('.md')} and {args.out.with_suffix('.png')}")
