"""How many threads a call uses unless told otherwise."""

import os
from functools import cache
from pathlib import Path

from thrifty.errors import ThriftyError

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

#: Threads that take part in a step (`kMostParts` in csrc/step/run.cpp).
MOST_THREADS = 64


def cpu_threads() -> int:
    """Logical processors that this process may run on."""
    return len(_affinity())


@cache
def default_threads() -> int:
    """THRIFTY_NUM_THREADS, or the physical cores that this process may use; at least one.

    Two hardware threads of a core share its path to memory, so the second one adds nothing to a product of one row.
    """
    text = os.environ.get("THRIFTY_NUM_THREADS")
    if not text:
        return max(1, min(_cores(), _quota()))
    if not text.isdecimal() or int(text) < 1:
        raise ThriftyError(f"[native] THRIFTY_NUM_THREADS must be a whole number above 0; got '{text}'")
    return int(text)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores() -> int:
    cpus = _affinity()
    try:
        siblings = {(_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus}
    except OSError:
        return len(cpus)
    return len(siblings)


def _quota() -> int:
    """Processors' worth of time that a container grants."""
    try:
        time, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return cpu_threads()
    return cpu_threads() if time == "max" else max(1, int(time) // int(period))
