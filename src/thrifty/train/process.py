"""Settings of the process that make training steps on a CPU quick; they take hold before torch is imported."""

import ctypes
import os
import sys

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def prepare_process() -> None:
    """Call before torch is imported. Keeps freed memory, and lets waiting threads sleep soon.

    A step makes and drops the same big temporaries again and again. From `mmap`, each costs a page fault per 4 KiB and
    the zeroing of it: with that, a product of 8192 × 256 × 4096 took 25 ms instead of 7. And GNU OpenMP's threads spin
    while they wait: beside another busy process a step of 0.25 s took 4 to 15 s, and 0.25 s where they spin shortly.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
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
