"""Decoding after 65 536 tokens beside decoding after w: a step's time, and the bytes of a sequence.

    python benchmarks/long_context.py

Small random models of each mixer that does not grow with the text, one thread, timed in turn.
"""

import tempfile
from pathlib import Path

import numpy as np

from thrifty.runtime import load
from thrifty.runtime.measure import Size, Timer, write_random

WINDOW, LONG, ROUNDS = 512, 65_536, 6
MIXERS = {"dynamic_mask": ["dynamic_mask"], "mlgru": ["mlgru"], "ssd 7 : 1": [*["ssd"] * 7, "dynamic_mask"]}


def main() -> None:
    for name, mixers in MIXERS.items():
        size = Size(2048, 512, 1024, max(4, len(mixers)), 4, 2)
        fields = {"token_mixers": mixers, "keep_window_size": WINDOW, "max_position_embeddings": LONG}
        with tempfile.TemporaryDirectory() as folder:
            path = write_random(Path(folder) / "model", size, model_type="thrifty", **fields)
            runtime = load(path, n_threads=1, weight_format="i2")
            decoder, timer = runtime._decoder, Timer(runtime)
            nbytes = {context: decoder.new_cache(context).nbytes for context in (WINDOW, LONG)}
            if nbytes[WINDOW] != nbytes[LONG]:
                raise SystemExit(f"{name}: the cache grows: {nbytes}")
            timer.decode(LONG, seconds=0.1)
            ratios = []
            for _ in range(ROUNDS):
                short, long = (float(np.median(timer.decode(context, seconds=0.3)[0])) for context in (WINDOW, LONG))
                ratios.append(long / short)
            low, middle, high = min(ratios), float(np.median(ratios)), max(ratios)
            print(f"{name:12} {LONG} / {WINDOW}: {middle:.3f} ({low:.3f} ... {high:.3f}), {nbytes[LONG]} bytes both")


if __name__ == "__main__":
    main()
