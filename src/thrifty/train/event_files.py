"""TensorBoard's event files, without its tracebacks when the disk is full."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers.integrations.integration_utils import TensorBoardCallback

from thrifty.checkpoint import explained


class EventFiles(TensorBoardCallback):
    """TensorBoard's callback, writing below `folder`. Raises ThriftyError where the disk is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with explained(folder):
            super().__init__(SummaryWriter(str(folder)))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with explained(self.folder):
            super().on_train_begin(*args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        with explained(self.folder):
            super().on_log(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        with explained(self.folder):
            super().on_train_end(*args, **kwargs)


@contextmanager
def event_files(folder: Path) -> Iterator[EventFiles]:
    """`EventFiles`, closed at the end of the block whatever happens in it.

    TensorBoard writes in a thread, which hands its exception to the next call and lets Python print it, too; here it is
    told once.
    """
    hook = threading.excepthook

    def told_once(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            hook(failure)

    threading.excepthook = told_once
    try:
        files = EventFiles(folder)
        try:
            yield files
        finally:
            if files.tb_writer is not None:
                # Only after another exception, the reason why the block was left.
                with suppress(OSError):
                    files.tb_writer.close()
    finally:
        threading.excepthook = hook
