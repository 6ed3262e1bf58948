"""What the benchmarks share: the machine, and medians of measurements taken in turn."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from thrifty import native
from thrifty.runtime.measure import last_level_cache

#: The three loops with which `thrifty.native.read_bandwidth` reads.
READ_LOOPS = range(3)


def machine_line() -> str:
    """Processor, cache and instruction set, as a benchmark's first line."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return (
        f"{name}, {native.cpu_threads()} threads, {last_level_cache() >> 20} MiB last-level cache;"
        f" load {os.getloadavg()[0]:.1f}; isa {native.isa()}"
    )


def beyond_the_cache() -> int:
    """Bytes of a buffer of which the cache holds a quarter at most, or half of the free memory where that is less.

    Prints which, where it is less: part of what is read then comes from the cache.
    """
    half = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    wanted = 4 * last_level_cache()
    if half < wanted:
        print(
            f"note: memory is short; buffers of {half >> 20} MiB instead of {wanted >> 20} MiB,"
            f" {half / last_level_cache():.1f} times the last-level cache instead of 4"
        )
    return min(wanted, half)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def best_seconds(function: Callable[[], object], budget: float = 0.3) -> float:
    """Least time of a call, repeated for `budget` seconds: what it takes when nothing disturbs it."""
    function()
    best, spent = float("inf"), 0.0
    while spent < budget:
        took = seconds(function)
        best, spent = min(best, took), spent + took
    return best


def beside_reading(
    buffer: np.ndarray, n_threads: int, rounds: int, product: Callable[[], object]
) -> tuple[float, float]:
    """Bytes per second at which `product` goes through a buffer, and of the best of three read loops over it.

    The loops and the product take turns, so that whatever else the machine does meets all of them; medians.
    """
    speeds: list[list[float]] = [[] for _ in (*READ_LOOPS, product)]
    for _ in range(rounds):
        for loop in READ_LOOPS:
            speeds[loop].append(native.read_bandwidth(buffer, loop, n_threads))
        speeds[-1].append(buffer.nbytes / seconds(product))
    medians = [float(np.median(speed)) for speed in speeds]
    return medians[-1], max(medians[:-1])
