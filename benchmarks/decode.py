"""Whole decode steps of random packed models, beside the bandwidth at which this machine reads memory.

    python benchmarks/decode.py [SIZE ...] [--threads 1 2] [--formats i2 base3] [--tokens 100]

A step reads every weight once, so bytes per token x tokens per second can at best be the read bandwidth. The share says
how near a step is to that; small models are held up by Python's calls between the products instead, and fit in caches.
The result is checked before anything is timed.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from thrifty import native, spec
from thrifty.checkpoint import open_folder
from thrifty.runtime import Runtime, load
from thrifty.runtime.measure import SIZES, read_bandwidth, step_seconds, write_random


def check(folder: Path, runtime: Runtime, weight_format: str) -> None:
    """A product of one row equals the spec bit for bit, and steps choose what reading the tokens at once would."""
    config, rng = runtime.config, np.random.default_rng(1)
    codes, scale = open_folder(folder).codes("model.layers.0.mlp.down_proj", config.hidden_size)
    x_codes, x_scales = spec.quantize_per_token(rng.standard_normal((1, config.intermediate_size), np.float32))
    y = native.PackedMatrix.from_codes(codes, weight_format).matmul(x_codes, x_scales, float(scale))
    np.testing.assert_array_equal(y, spec.ternary_matmul(x_codes, x_scales, codes, float(scale)))
    tokens = rng.integers(0, config.vocab_size, 8).tolist()
    made = runtime.generate_tokens(tokens, max_new_tokens=4, temperature=0, ignore_eos=True)
    logits = runtime.logits(tokens + made)[7:-1]
    chosen = logits[np.arange(4), made]
    assert (chosen >= logits.max(-1) - 2e-2 * np.ptp(logits)).all(), "decode and prefill disagree"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["demo", "small"], metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, native.default_threads()}))
    parser.add_argument("--formats", nargs="+", default=["i2", "base3"])
    parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    print(f"kernels: {native.isa()}")
    bandwidth = {n: read_bandwidth(n) for n in options.threads} if native.available() else {}
    for n, rate in bandwidth.items():
        print(f"read bandwidth, {n} thread{'s' * (n > 1)}: {rate / 1e9:.1f} GB/s")
    print("size    format  threads  ms/token  tokens/s  MB/token  GB/s   of bandwidth")
    for name in options.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_random(Path(temporary) / name, SIZES[name])
            for weight_format in options.formats:
                for n in options.threads:
                    runtime = load(folder, weight_format=weight_format, n_threads=n)
                    check(folder, runtime, weight_format)
                    seconds, size = step_seconds(runtime, options.tokens), runtime.bytes_per_token
                    share = f"{100 * size / seconds / bandwidth[n]:.0f} %" if n in bandwidth else "-"
                    speed = f"{1e3 * seconds:8.3f}  {1 / seconds:8.0f}  {size / 1e6:8.2f}  {size / seconds / 1e9:4.1f}"
                    print(f"{name:7} {weight_format:7} {n:7}  {speed}   {share}")


if __name__ == "__main__":
    main()
