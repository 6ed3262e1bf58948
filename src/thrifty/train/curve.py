"""The loss curve, as a picture and as characters."""

from collections.abc import Sequence
from pathlib import Path

from thrifty.checkpoint import atomic_file

#: Heights of a terminal cell, in eighths.
BLOCKS = " ▁▂▃▄▅▆▇█"


def losses(history: Sequence[dict[str, float]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key` in the trainer's log history."""
    points = [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot(history: Sequence[dict[str, float]], file: Path) -> None:
    """Draw training and held-out loss (nats per token) over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        steps, values = losses(history, key)
        axes.plot(steps, values, label=label, marker="o" if key == "eval_loss" else None, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(file) as picture:
        figure.savefig(picture, format="png", dpi=120)


def terminal_plot(values: Sequence[float], width: int = 60, height: int = 8) -> str:
    """`values` as columns of blocks, with the largest and the smallest value at the axis."""
    if not values:
        return ""
    columns = [values[int(i * len(values) / width)] for i in range(width)] if len(values) > width else list(values)
    low, high = min(columns), max(columns)
    # The lowest column keeps one eighth of a cell, so that it is seen.
    eighths = [1 + round((v - low) / ((high - low) or 1.0) * (8 * height - 1)) for v in columns]
    rows = []
    for row in reversed(range(height)):
        label = f"{high:7.2f}" if row == height - 1 else f"{low:7.2f}" if row == 0 else " " * 7
        cells = "".join(BLOCKS[min(max(e - 8 * row, 0), 8)] for e in eighths)
        rows.append(f"{label} ┤{cells}")
    return "\n".join(rows)
