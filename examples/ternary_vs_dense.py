"""Trains ternary models and their dense twins on the same tokens, and says how far apart they end.

    python examples/ternary_vs_dense.py wikitext/ shakespeare.txt [--steps 1280] [--seeds 0 1 2] [--output FOLDER]

Corpora are the given files or folders and the built-in text; the model is that of the recipe `bytes`. Each arm's
learning rate is picked on the first given corpus, in runs of `--pick-steps`, from three or, where the best is the first
or last of them, more; then every corpus is trained on with every seed. Which bytes are read in which order depends on
corpus and seed, not on the arm. Runs are commands of `thrifty train`, `--jobs` at a time, each in a folder; a repeated
command goes on where it stopped. It takes hours. The last line is the mean gap in bits per byte and its deviation.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

ARMS = ("dense", "ternary")


@dataclass(frozen=True)
class Run:
    """One training: what, on what, how."""

    arm: str
    corpus: str
    learning_rate: float
    seed: int
    steps: int

    def folder(self, output: Path) -> Path:
        return output / f"{Path(self.corpus).stem}-{self.arm}-lr{self.learning_rate}-seed{self.seed}-{self.steps}"

    def command(self, output: Path) -> list[str]:
        text = [] if self.corpus == "builtin" else [self.corpus]
        options = f"--recipe bytes --linear {self.arm} --steps {self.steps}".split()
        options += f"--learning-rate {self.learning_rate} --seed {self.seed} --output {self.folder(output)}".split()
        return [sys.executable, "-m", "thrifty", "train", *text, *options]

    def record(self, output: Path) -> dict:
        """What the run left, or nothing."""
        file = self.folder(output) / "training.json"
        record = json.loads(file.read_text()) if file.exists() else {}
        return record if record.get("finished") else {}


def run_all(runs: list[Run], output: Path, jobs: int) -> None:
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}

    def one(run: Run) -> None:
        if run.record(output):
            return
        folder = run.folder(output)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "w") as log:
            subprocess.run(run.command(output), check=True, env=environment, stdout=log, stderr=log)
        record = run.record(output)
        print(f"{folder.name}: {record['bits_per_byte']:.4f} in {record['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="*")
    parser.add_argument("--steps", type=int, default=1280)
    parser.add_argument("--pick-steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.75e-3, 1.5e-3, 3e-3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/ternary_vs_dense"))
    args = parser.parse_args()
    corpora = ["builtin", *args.corpora]
    first = (args.corpora or corpora)[0]
    rates = {arm: list(args.learning_rates) for arm in ARMS}
    picked: dict[str, float] = {}
    # An arm whose best rate is the first or last tried gets one beyond it.
    while len(picked) < len(ARMS):
        tried = [Run(arm, first, rate, 0, args.pick_steps) for arm in ARMS for rate in rates[arm]]
        run_all(tried, args.output, args.jobs)
        for arm in set(ARMS) - picked.keys():
            scores = {run.learning_rate: run.record(args.output)["bits_per_byte"] for run in tried if run.arm == arm}
            best = min(scores, key=scores.__getitem__)
            if min(scores) < best < max(scores):
                picked[arm] = best
                print(arm, {rate: round(scores[rate], 4) for rate in sorted(scores)}, "picked", best, flush=True)
            else:
                rates[arm].append(best / 2 if best == min(scores) else best * 2)
    runs = {
        (corpus, seed, arm): Run(arm, corpus, picked[arm], seed, args.steps)
        for seed, corpus, arm in product(args.seeds, corpora, ARMS)
    }
    run_all(list(runs.values()), args.output, args.jobs)
    print("| corpus | seed | dense | ternary | gap | minutes |")
    gaps = []
    for corpus, seed in product(corpora, args.seeds):
        dense, ternary = (runs[corpus, seed, arm].record(args.output) for arm in ARMS)
        gaps.append(100 * (ternary["bits_per_byte"] / dense["bits_per_byte"] - 1))
        minutes = f"{dense['seconds'] / 60:.1f}, {ternary['seconds'] / 60:.1f}"
        bits = f"{dense['bits_per_byte']:.4f} | {ternary['bits_per_byte']:.4f}"
        print(f"| {Path(corpus).stem} | {seed} | {bits} | {gaps[-1]:+.2f} % | {minutes} |")
    spread = f" ± {stdev(gaps):.2f}" if len(gaps) > 1 else ""
    print(f"mean gap {mean(gaps):+.2f} %{spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
