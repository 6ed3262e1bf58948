"""Settings of the process that make training steps on a CPU quick; they take hold before torch is imported."""

import ctypes
import os
import sys
from types import ModuleType

from thrifty.errors import ThriftyError

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def prepare_process() -> None:
    """Call before torch is imported. Keeps freed memory, lets waiting threads sleep soon, and leaves TensorFlow out.

    A step makes and drops the same big temporaries again and again. From `mmap`, each costs a page fault per 4 KiB and
    the zeroing of it: with that, a product of 8192 × 256 × 4096 took 25 ms instead of 7. And GNU OpenMP's threads spin
    while they wait: beside another busy process a step of 0.25 s took 4 to 15 s, and 0.25 s where they spin shortly.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # TensorBoard's own switch. Without it, its writer imports TensorFlow where it is installed: three seconds.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    keep_pages()


def keep_pages() -> bool:
    """Tell glibc to serve large blocks from the heap and never to give it back; returns whether there is a glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1), mallopt(_M_TOP_PAD, 256 << 20)])


def world_size() -> int:
    """Number of processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


def sequences_at_once(batch_size: int, accumulate: int) -> int:
    """Sequences of a batch that one process computes at once. Raises ThriftyError for a batch that is not divided."""
    parts = world_size() * accumulate
    if batch_size % parts:
        rule = f"[train] batch_size must be a multiple of {world_size()} processes times accumulate = {accumulate}"
        raise ThriftyError(f"{rule}; got {batch_size}; choose {-(-batch_size // parts) * parts}")
    return batch_size // parts
