"""The runtime beside llama.cpp (TQ2_0, TQ1_0) and litespark-inference: one shape, the same random ternary weights.

    python benchmarks/runtime_vs_peers.py [--shape 2b] [--threads 1 2] [--only tq2_0 litespark] [--measure decode]

Every runtime has a process of its own and keeps its model; within a round they take turns, with the bandwidth of the
memory and the int8 peak, so that ratios and shares compare what happened together. Results are checked first: logits of
the peers are finite, and go with thrifty's where both compute the same function; thrifty's greedy tokens do not depend
on the weight format. Medians, with the lowest and highest round.

Peers may live in a Python of their own (--peer-python, or THRIFTY_PEER_PYTHON): llama-cpp-python and
litespark-inference. What is not installed there is left out, and said. --folder keeps the models for the next run, and
--prepare makes them and stops, so that a measurement need not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _measure import machine_line
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from thrifty import native
from thrifty.checkpoint import open_folder
from thrifty.convert import to_gguf
from thrifty.errors import ThriftyError
from thrifty.runtime.measure import SIZES, Limits, summary, warm, write_random
from thrifty.runtime.worker import COMMAND, Worker

WORKER = str(Path(__file__).with_name("_peers.py"))
#: Positions at which decode is timed, and tokens of the prompt; a load has room for both.
SHORT, LONG, PROMPT = 64, 4096, 512
ROOM = PROMPT + SHORT
#: What all runtimes are asked for.
MEASURES = ("decode", "prefill")
#: Options of `thrifty generate`, by default.
OPTIONS = {"head_bits": 8, "cache_bits": 8}


@dataclass(frozen=True)
class Engine:
    """A runtime: its process, its model, and how that is made."""

    name: str
    command: tuple[str, ...]
    #: Modules that its Python must have.
    modules: tuple[str, ...]
    #: File or folder of its model, beside the others.
    model: str


THRIFTY = Engine("thrifty", COMMAND, (), "packed")


def peers(python: str) -> dict[str, Engine]:
    """By the names of --only."""
    found = {}
    for kind in ("TQ2_0", "TQ1_0"):
        command = (python, WORKER, "llama")
        found[kind.lower()] = Engine(f"llama.cpp {kind}", command, ("llama_cpp",), f"{kind}.gguf")
    command = (python, WORKER, "litespark")
    return found | {"litespark": Engine("litespark", command, ("litespark_inference",), "bf16")}


def installed(engine: Engine) -> bool:
    """Whether the peer's Python finds its modules; says which it does not."""
    code = "import importlib.util, sys; sys.exit(any(map(lambda m: not importlib.util.find_spec(m), sys.argv[1:])))"
    there = subprocess.run([engine.command[0], "-c", code, *engine.modules]).returncode == 0
    if not there:
        print(f"note: {engine.command[0]} lacks {' or '.join(engine.modules)}; {engine.name} is left out")
    return there


def prepare(folder: Path, shape: str, chosen: dict[str, Engine]) -> dict[str, Engine]:
    """Make the models that are not there. Returns the engines that can run the shape."""
    packed = folder / "packed"
    if not packed.exists():
        write_random(packed, SIZES[shape])
    able = {}
    for key, engine in chosen.items():
        widths = SIZES[shape].hidden_size, SIZES[shape].intermediate_size
        if engine.model.endswith(".gguf") and any(width % 256 for width in widths):
            print(f"note: blocks of 256 do not fit the widths {widths}; {engine.name} is left out")
            continue
        able[key] = engine
        model = folder / engine.model
        if not model.exists():
            make(engine, packed, model)
    return able


def make(engine: Engine, packed: Path, model: Path) -> None:
    """Make the model of a peer from the packed folder."""
    if model.suffix == ".gguf":
        # llama.cpp takes ReLU² for SiLU, which costs the same.
        to_gguf(open_folder(packed), model, model.stem, any_activation=True)
        return
    new = model.with_name(f"new-{model.name}")
    with Worker(engine.name, engine.command) as worker:
        worker("write_bf16", source=str(packed), folder=str(new))
    new.rename(model)


def load(engine: Engine, folder: Path, threads: int, **options: Any) -> tuple[Worker, dict[str, Any]]:
    """A process with the model loaded, and what the load says."""
    worker = Worker(engine.name, engine.command, {"OMP_NUM_THREADS": str(threads)})
    model = folder / engine.model
    warm(model)
    if engine.name == "thrifty":
        return worker, worker("load", path=str(model), n_threads=threads, **{"max_context": ROOM, **OPTIONS, **options})
    return worker, worker("load", path=str(model), context=ROOM, threads=threads)


def check_formats(folder: Path, vocabulary: int) -> None:
    """thrifty's greedy tokens are the same in every weight format."""
    prompt = np.random.default_rng(1).integers(0, vocabulary, 9).tolist()
    made = []
    for weight_format in ("i2", "base3"):
        with Worker("thrifty") as worker:
            worker("load", path=str(folder / "packed"), weight_format=weight_format, max_context=64, **OPTIONS)
            made.append(worker("generate", tokens=prompt, count=16))
    if made[0] != made[1]:
        raise ThriftyError(f"[benchmark] greedy tokens must not depend on the weight format; got {made}")


def check_logits(workers: dict[str, Worker], vocabulary: int) -> None:
    """Logits are finite, and litespark's, which computes the same function, go with thrifty's."""
    prompt = np.random.default_rng(2).integers(0, vocabulary, 24).tolist()
    logits = {key: np.array(worker("logits", tokens=prompt)) for key, worker in workers.items()}
    for key, values in logits.items():
        if values.shape != (vocabulary,) or not np.isfinite(values).all():
            raise ThriftyError(f"[benchmark] {key} must give {vocabulary} finite logits; got {values}")
    if "litespark" in logits:
        together = float(np.corrcoef(logits["thrifty"], logits["litespark"])[0, 1])
        print(f"logits of litespark and thrifty correlate at {together:.4f}")
        # Thirty layers of random weights blow up what rounding begins; another function correlates at nothing.
        if together < 0.5:
            raise ThriftyError("[benchmark] litespark and thrifty must compute the same function; their logits differ")


def compare(
    chosen: dict[str, Engine], folder: Path, threads: int, what: list[str], rounds: int, limits: Limits, vocabulary: int
) -> dict[str, Any]:
    """Every engine in turn with `threads` threads: medians of decode and prefill, ratios, shares, memory, load."""
    workers: dict[str, Worker] = {}
    records: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for key, engine in chosen.items():
            workers[key], records[key] = load(engine, folder, threads)
            stack.enter_context(workers[key])
        check_logits(workers, vocabulary)
        taken: dict[tuple[str, str], list[float]] = {}
        ceilings: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, value in limits(threads).items():
                ceilings.setdefault(name, []).append(value)
            for key, worker in workers.items():
                if "decode" in what:
                    answer = worker("decode", context=SHORT, seconds=0.5)
                    if key == "thrifty":
                        records[key]["step_bytes"] = answer["bytes"]
                    taken.setdefault((key, "decode"), []).append(1 / median(answer["seconds"]))
                if "prefill" in what:
                    taken.setdefault((key, "prefill"), []).append(PROMPT / worker("prefill", prompt=PROMPT))
        for key, worker in workers.items():
            records[key] |= {"memory": worker("memory")}
    for (key, kind), values in taken.items():
        records[key][kind] = summary(values)
        if key != "thrifty":
            own = taken["thrifty", kind]
            records[key][f"{kind}_ratio"] = summary([mine / other for mine, other in zip(own, values, strict=True)])
    own = records["thrifty"]
    limited = {
        "decode": (own.pop("step_bytes", None), "bandwidth"),
        "prefill": (own["operations_per_token"], "int8_peak"),
    }
    for kind, (work, limit) in limited.items():
        if kind in own and ceilings:
            speeds = zip(taken["thrifty", kind], ceilings[limit], strict=True)
            own[f"{kind}_share"] = summary([work * speed / most for speed, most in speeds])
    return {"threads": threads, **{name: summary(values) for name, values in ceilings.items()}, "engines": records}


def alone(folder: Path, threads: int, what: list[str], rounds: int, limits: Limits) -> dict[str, dict[str, float]]:
    """thrifty at a long context with the 8-bit cache, eight sequences against one, and a step less its ops."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    if "context" in what:
        with load(THRIFTY, folder, threads, max_context=LONG, cache_bits=8)[0] as worker:
            for _ in range(rounds):
                answer = worker("decode", context=LONG)
                speed = 1 / median(answer["seconds"])
                note(f"decode at {LONG} with the 8-bit cache, tokens/s", speed)
                if limit := limits(threads).get("bandwidth"):
                    note(f"decode at {LONG} with the 8-bit cache, share of bandwidth", answer["bytes"] * speed / limit)
    if "overhead" in what:
        with load(THRIFTY, folder, threads)[0] as worker:
            for _ in range(rounds):
                note("share of a step that is in none of its ops", worker("overhead", context=SHORT))
    if "batch" in what:
        with load(THRIFTY, folder, threads)[0] as worker:
            for _ in range(rounds):
                one, eight = (n / median(worker("decode", context=SHORT, batch=n)["seconds"]) for n in (1, 8))
                note("decode of 8 sequences, tokens/s", eight)
                note("decode of 8 sequences over decode of one", eight / one)
    return {name: summary(values) for name, values in found.items()}


def print_comparison(result: dict[str, Any]) -> None:
    """One table of the engines with a number of threads."""
    table = Table(title=_title(result), box=SIMPLE, title_justify="left", padding=0, pad_edge=False)
    for heading in (
        "runtime",
        "decode",
        "thrifty is ×",
        "prefill",
        "thrifty is ×",
        "load s",
        "anonymous",
        "with files",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, record in result["engines"].items():
        held = record["memory"] or {"anonymous": 0, "peak": 0}
        table.add_row(
            key,
            *(
                _spread(record.get(name), digits)
                for kind in MEASURES
                for name, digits in ((kind, 1), (f"{kind}_ratio", 2))
            ),
            f"{record['load_seconds']:.2f}",
            *(f"{held[name] / 1e6:.0f} MB" for name in ("anonymous", "peak")),
        )
    Console(width=160).print(table)
    own = result["engines"]["thrifty"]
    for kind, limit in zip(MEASURES, ("bandwidth", "int8 peak"), strict=True):
        if f"{kind}_share" in own:
            share = {name: 100 * value for name, value in own[f"{kind}_share"].items()}
            print(f"thrifty's {kind}: {_spread(share, 1)} % of the {limit}")
    weights, cache = own["weight_bytes"] / 1e6, ROOM * own["cache_bytes_per_position"] / 1e6
    print(f"thrifty holds weights of {weights:.1f} MB ({own['weight_format']}) and a cache of {cache:.1f} MB")


def _title(result: dict[str, Any]) -> str:
    title = f"{_threads(result['threads'])}; tokens/s, median (lowest–highest)"
    if "bandwidth" in result:
        bandwidth, peak = result["bandwidth"]["median"] / 1e9, result["int8_peak"]["median"] / 1e12
        title += f"; bandwidth {bandwidth:.1f} GB/s, int8 peak {peak:.2f} TOP/s"
    return title


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def _spread(values: dict[str, float] | None, digits: int) -> str:
    if values is None:
        return "-"
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f}–{values['high']:.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="2b", help="demo and small take seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="*", choices=peers(""), help="peers; all by default, none for thrifty alone")
    measures = (*MEASURES, "context", "batch", "overhead")
    parser.add_argument("--measure", nargs="+", choices=measures, default=measures)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the models are kept; a temporary folder by default")
    parser.add_argument("--prepare", action="store_true", help="make the models and stop")
    parser.add_argument("--peer-python", default=os.environ.get("THRIFTY_PEER_PYTHON", sys.executable))
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()
    if not native.available():
        print(f"there is no native library to time: {native.info()['reason']}")
        return 0
    print(machine_line())
    wanted = {key: peer for key, peer in peers(args.peer_python).items() if args.only is None or key in args.only}
    available = {key: peer for key, peer in wanted.items() if installed(peer)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / args.shape
        folder.mkdir(parents=True, exist_ok=True)
        try:
            chosen = {"thrifty": THRIFTY} | prepare(folder, args.shape, available)
            results = [] if args.prepare else measure(chosen, folder, args)
        except ThriftyError as wrong:
            print(f"wrong: {wrong}", file=sys.stderr)
            return 1
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_line(), "shape": args.shape, "results": results}, indent=2))
    return 0


def measure(chosen: dict[str, Engine], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, measure and print, for each number of threads."""
    vocabulary, results, limits = SIZES[args.shape].vocab_size, [], Limits()
    check_formats(folder, vocabulary)
    for threads in args.threads:
        result = {"threads": threads}
        if set(MEASURES) & set(args.measure):
            result |= compare(chosen, folder, threads, args.measure, args.rounds, limits, vocabulary)
            print_comparison(result)
        result["alone"] = alone(folder, threads, args.measure, args.rounds, limits)
        for name, values in result["alone"].items():
            print(f"thrifty with {_threads(threads)}, {name}: {_spread(values, 3 if values['high'] < 100 else 1)}")
        results.append(result)
    return results


if __name__ == "__main__":
    sys.exit(main())
