"""Times decoding with drafts beside decoding without, on text that repeats itself and on text that does not.

    python benchmarks/drafting.py [MODEL] [--size small|2b] [--draft 4 8 16]

A random model writes both: greedy, with a repetition penalty far below 1, it goes on with the tokens of its prompt. Of
two, it makes a text that repeats itself; of sixteen, one in which two tokens often come again and the third does not,
the worst that a draft can meet. With MODEL, the folder of a trained one, the texts are its own: greedy, and sampled.
The tokens of every run are checked to be those without drafts; runs alternate, and a ratio is that of the medians.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _measure import machine_line

from thrifty.runtime import Drafting, load, measure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--size", default="small", choices=sorted(measure.SIZES))
    parser.add_argument("--draft", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or measure.write_random(Path(folder) / "m", measure.SIZES[args.size])
        runtime = load(model, head_bits=8, cache_bits=8)
    texts: dict[str, dict[str, Any]] = {
        "repeats itself": {"prompt": [100, 101], "temperature": 0, "repetition_penalty": 1e-3},
        "does not": {"prompt": list(range(100, 116)), "temperature": 0, "repetition_penalty": 1e-3},
    }
    if args.model:
        prompt = runtime.encode("The with statement")
        texts = {
            "greedy": {"prompt": prompt, "temperature": 0},
            "sampled": {"prompt": prompt, "temperature": 1, "seed": 0},
        }
    print("text             draft   accepted / proposed   tokens/s   times without")
    for name, options in texts.items():
        expected: list[int] = []
        seconds: dict[int, list[float]] = {draft: [] for draft in (0, *args.draft)}
        counts = {}
        for _ in range(args.repeats):
            for draft in seconds:
                counts[draft] = Drafting(draft)
                begun = time.perf_counter()
                made = runtime.generate_tokens(
                    max_new_tokens=args.tokens, ignore_eos=True, draft=counts[draft], **options
                )
                seconds[draft].append(time.perf_counter() - begun)
                expected = expected or made
                if made != expected:
                    raise RuntimeError(f"draft={draft} changed the text")
        for draft, count in counts.items():
            median = float(np.median(seconds[draft]))
            print(
                f"{name:15s}  {draft:5d}   {count.accepted:8d} / {count.proposed:8d}   {args.tokens / median:8.1f}"
                f"   {float(np.median(seconds[0])) / median:13.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
