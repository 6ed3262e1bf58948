"""What a person sees while a model trains: a bar, losses, the time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.utils import logging


class ProgressBar(TrainerCallback):
    """A bar on standard error, with the newest losses; a held-out loss gets a line that stays."""

    def __init__(self, console: Console, nats_to_bits_per_byte: float):
        self.scale = nats_to_bits_per_byte
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Training that fails does not come to its end, and the bar hides the cursor.
        self.bar.stop()

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args, state, control, **kwargs):
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if self.task is not None and "loss" in logs:
            self.bar.update(self.task, note=f"loss {logs['loss']:.3f}")
        if "eval_loss" in logs:
            bits = logs["eval_loss"] * self.scale
            self.bar.console.print(f"  step {state.global_step:>6}  held-out text: {bits:.3f} bits per byte")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()


@contextmanager
def quiet() -> Iterator[None]:
    """Without bars and remarks of transformers (that a checkpoint holds tied weights once, say): there is a bar."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
