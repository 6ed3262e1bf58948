"""Times `ternary_matmul` beside the bandwidth at which this machine reads memory.

    python benchmarks/ternary_matmul.py [--isa NAME] [--threads 1 2] [--rounds 7]

One row: every weight is read once, so bytes per second can at best be the read bandwidth, and the share says how near
they are. "matrix" is one matrix four times as large as the last-level cache; "layers" are the same bytes as matrices of
6912 x 2560 multiplied in turn, calls from Python included. Many rows: billions of weights times rows per second, beside
numpy's float32 product. Results are checked against the spec first; the exit code is 1 if one is wrong.
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np
from _measure import beside_reading, best_seconds, beyond_the_cache, machine_line

from thrifty import native, spec
from thrifty.native import PackedMatrix

ROWS, COLS = 6912, 2560


class Wrong(Exception):
    """A result that is not the spec's."""


def check(y: np.ndarray, expected: np.ndarray, what: str) -> None:
    if not np.array_equal(y, expected):
        raise Wrong(f"{what} is not what the spec says on {native.isa()}")


def operands(rows: int, cols: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (n, cols), np.int8)
    return rng.integers(-1, 2, (rows, cols), np.int8), x, rng.uniform(0.1, 1, n).astype(np.float32)


def into(
    matrix: PackedMatrix, x: np.ndarray, x_scales: np.ndarray, y: np.ndarray, n_threads: int
) -> Callable[[], None]:
    """A product by 0.5 between fixed buffers, as a call of `matmul_into`; x has no padding to add."""
    w_scale = np.full(1, 0.5, np.float32)
    arguments = (x.ctypes.data, x.shape[1], x_scales.ctypes.data, len(x), w_scale.ctypes.data, 1, None, y.ctypes.data)

    def product(kept: tuple[np.ndarray, ...] = (x, x_scales, w_scale, y)) -> None:
        matrix.matmul_into(*arguments, n_threads)

    return product


def check_sizes(fmt: str) -> None:
    for rows, cols, n in ((1, 1, 1), (63, 257, 3), (500, 500, 17), (257, 3000, 70)):
        w, x, scales = operands(rows, cols, n)
        y = PackedMatrix.from_codes(w, fmt).matmul(x, scales, 0.5)
        check(y, spec.ternary_matmul(x, scales, w, 0.5), f"{fmt} {rows} x {cols}, {n} rows")


def one_row(fmt: str, threads: list[int], rounds: int) -> None:
    """Prints the shares of the read bandwidth."""
    w, x, scales = operands(ROWS, COLS, 1)
    expected = spec.ternary_matmul(x, scales, w, 0.5)
    packed = native.pack(fmt, w).reshape(-1)
    copies = beyond_the_cache() // packed.size
    buffer = native.aligned_empty(copies * packed.size)
    buffer.reshape(copies, -1)[...] = packed

    whole = PackedMatrix(buffer, copies * ROWS, COLS, fmt)
    layers = [PackedMatrix(part, ROWS, COLS, fmt) for part in np.split(buffer, copies)]
    y, y_layer = np.empty((1, whole.rows), np.float32), np.empty((1, ROWS), np.float32)
    for n_threads in threads:
        matrix = into(whole, x, scales, y, n_threads)
        calls = [into(layer, x, scales, y_layer, n_threads) for layer in layers]

        def each_layer(calls: list[Callable[[], None]] = calls) -> None:
            for call in calls:
                call()

        for name, product in (("matrix", matrix), ("layers", each_layer)):
            speed, read = beside_reading(buffer, n_threads, rounds, product)
            weights = speed / packed.size * ROWS * COLS
            print(
                f"{fmt:6} {n_threads:7} {name:7} {speed / 1e9:6.2f} GB/s {read / 1e9:6.2f} GB/s {speed / read:7.1%}"
                f" {weights / 1e9:7.1f} G weights/s"
            )
        check(y.reshape(copies, ROWS), np.tile(expected, (copies, 1)), f"{fmt} with {n_threads} threads")
        check(y_layer, expected, f"{fmt} in layers with {n_threads} threads")


def many_rows(formats: list[str], n_threads: int) -> None:
    """Prints rates by rows of x, on one matrix that stays in the cache."""
    print(
        f"\nrows of x, {n_threads} thread(s)    "
        + "".join(f"{fmt:>8}" for fmt in formats)
        + "   numpy   (G weights x rows/s)"
    )
    for n in (1, 2, 4, 8, 16, 64, 256):
        w, x, scales = operands(ROWS // 4, COLS, n)
        expected = spec.ternary_matmul(x, scales, w, 0.5)
        rates = []
        for fmt in formats:
            matrix, y = PackedMatrix.from_codes(w, fmt), np.empty(expected.shape, np.float32)
            took = best_seconds(into(matrix, x, scales, y, n_threads))
            check(y, expected, f"{fmt}, {n} rows")
            rates.append(w.size * n / took / 1e9)
        dense, x_float = w.astype(np.float32), x.astype(np.float32)
        rates.append(w.size * n / best_seconds(lambda: x_float @ dense.T) / 1e9)  # noqa: B023
        print(f"{n:8}" + " " * 17 + "".join(f"{rate:8.1f}" for rate in rates))


def call_cost() -> None:
    w, x, scales = operands(16, 80, 1)
    matrix, out = PackedMatrix.from_codes(w), np.empty((1, 16), np.float32)
    between_arrays = best_seconds(lambda: [matrix.matmul(x, scales, 0.5, out=out, n_threads=1) for _ in range(100)])
    call = into(matrix, x, scales, out, 1)
    between_addresses = best_seconds(lambda: [call() for _ in range(100)])
    print(
        f"\na call from Python, 16 x 80, one row: {between_arrays * 1e4:.1f} us between arrays,"
        f" {between_addresses * 1e4:.1f} us between addresses"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="instruction set; the best one by default")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", default=list(native.KERNEL_FORMATS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if not native.available():
        print("there is no native library to time")
        return 0
    native.select_isa(args.isa)
    print(machine_line())
    try:
        for fmt in args.formats:
            check_sizes(fmt)
        print("format threads one row    product        read   share")
        for fmt in args.formats:
            one_row(fmt, args.threads, args.rounds)
        many_rows(args.formats, 1)
        call_cost()
    except Wrong as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
