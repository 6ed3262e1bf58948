"""Times `quantize_per_token` with its fused RMSNorm, beside the spec in numpy.

    python benchmarks/quantize_per_token.py [--widths 2560 6912]

Every instruction set of the machine is checked against the spec, then timed on one thread. A row of a model fits in the
first cache and is read three times (sum of squares, largest magnitude, codes); GB/s count it once.
"""

import argparse
import sys

import numpy as np
from _measure import best_seconds, machine_line

from thrifty import native, spec


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 2560, 6912])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    args = parser.parse_args()
    if not native.available():
        print("there is no native library to time")
        return 0
    print(machine_line())
    print("     n      d  isa                us       GB/s   times numpy")
    rng = np.random.default_rng(0)
    for n in args.rows:
        for d in args.widths:
            x, gain = rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal(d).astype(np.float32)
            expected = spec.quantize_per_token(x, gain)
            numpy_seconds = best_seconds(lambda: spec.quantize_per_token(x, gain))  # noqa: B023
            codes, scales = np.empty((n, d), np.int8), np.empty(n, np.float32)
            addresses = (x.ctypes.data, gain.ctypes.data, 1e-5, True, n, d, codes.ctypes.data, d, scales.ctypes.data, 1)
            for isa in native.built_isas():
                if isa not in native.detected_isas():
                    continue
                native.select_isa(isa)
                took = best_seconds(lambda: native.quantize_into(*addresses))  # noqa: B023
                if not (np.array_equal(codes, expected[0]) and np.array_equal(scales, expected[1])):
                    print(f"wrong: {n} x {d} is not what the spec says on {isa}", file=sys.stderr)
                    return 1
                rate = x.nbytes / took / 1e9
                print(f"{n:6} {d:6}  {isa:12} {took * 1e6:8.2f} {rate:10.2f} {numpy_seconds / took:13.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
