"""`thrifty demo`: the whole flow on the built-in text, and a page of what was gained."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from thrifty.runtime import Runtime
    from thrifty.train.corpus import Corpus
    from thrifty.train.recipe import Recipe
    from thrifty.train.trainer import TrainingResult

EPILOG = """Examples:

thrifty demo

thrifty demo --fresh    (forget the earlier run)

thrifty demo --recipe tiny --output runs/tiny    (seconds; it babbles)
"""

#: Opens the sample, and the tokens that torch and the runtime continue greedily.
PROMPT = 'The "with" statement\n'
GREEDY_TOKENS = 200
#: Positions of the held-out text at which both must find the same token likeliest, and by which share of the range of
#: the logits torch's best must lead for it to count.
PARITY_TOKENS = 200
CLEAR_MARGIN = 1e-3
#: What speeds are measured on: tokens of a run, and how often, after a short one.
TIMED_TOKENS = 64
TIMED_RUNS = 3
SAMPLE_TOKENS = 160


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that is made.")] = Path(
        "runs/demo"
    ),
    recipe: Annotated[str, typer.Option(help="Size of the model, and how it is trained.")] = "demo",
    max_minutes: Annotated[float, typer.Option(help="A slow machine makes fewer steps, to train no longer.")] = 4.8,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on with an earlier run.")] = False,
) -> None:
    """Train, pack and run a small ternary model on the built-in text, and show what was gained.

    The text is Python's own help, and the documentation and code of its standard library: it is on every machine.
    """
    from thrifty.train.process import prepare_process

    prepare_process()
    import json

    from rich.console import Console

    from thrifty.checkpoint import atomic_file
    from thrifty.cli.demo_page import page
    from thrifty.cli.pack import pack_folder
    from thrifty.runtime import load
    from thrifty.train.corpus import builtin_corpus
    from thrifty.train.recipe import find_recipe
    from thrifty.train.trainer import quiet, train

    chosen = find_recipe(recipe)
    console = Console(stderr=True, soft_wrap=True)
    with console.status("reading Python's help and standard library"):
        corpus = builtin_corpus()
    model, packed = output / "model", output / "packed"
    trained = train(corpus, chosen, model, resume=False if fresh else None, max_minutes=max_minutes, console=console)
    with console.status("packing"), quiet():
        pack_folder(model, packed, overwrite=True)
    results = measure(corpus, chosen, trained, load(packed), packed, console)
    results["files"] = {"model": str(model), "packed": str(packed), "curve": str(model / "loss.png")}
    with atomic_file(output / "results.json", "w") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    Console().print(page(results, output / "results.json"))
    check(results)


def check(results: dict[str, Any]) -> None:
    """Raise ThriftyError where the runtime did not do what torch does."""
    parity, greedy = results["parity"], results["greedy"]
    way_out = "report it with results.json and the output of thrifty info"
    if parity["mismatches"]:
        got = f"{parity['mismatches']} of {parity['clear']} clear positions differ"
        raise ThriftyError(f"[demo] the runtime must find torch's likeliest tokens; {got}; {way_out}")
    if not greedy["equal"]:
        got = f"they differ from token {greedy['first_difference']} on"
        raise ThriftyError(
            f"[demo] torch and the runtime must write the same {greedy['tokens']} tokens; {got}; {way_out}"
        )


def measure(
    corpus: "Corpus", recipe: "Recipe", trained: "TrainingResult", runtime: "Runtime", packed: Path, console: "Console"
) -> dict[str, Any]:
    """Everything the page shows: text, training, bits per byte, bytes, speeds, the tokens of both, a sample."""
    from thrifty import native
    from thrifty.train.trainer import heldout_windows

    model = trained.model.cpu().eval()
    prompt = runtime.encode(PROMPT)
    with console.status("running both models on the same tokens"):
        torch_tokens = greedy_in_torch(model, prompt, GREEDY_TOKENS)
        runtime_tokens = greedy_in_runtime(runtime, prompt, GREEDY_TOKENS)
        read = runtime.encode(corpus.heldout)[: min(PARITY_TOKENS, runtime.max_context)]
        agreement = parity(model, runtime, read)
    with console.status("timing both models"):
        dense = dense_twin(model).eval()
        speeds = {
            "torch": tokens_per_second(partial(greedy_in_torch, model, prompt)),
            "torch dense": tokens_per_second(partial(greedy_in_torch, dense, prompt)),
            "runtime": tokens_per_second(partial(greedy_in_runtime, runtime, prompt)),
        }
    with console.status("scoring the held-out text with the packed model"):
        packed_bits = runtime.bits_per_byte(corpus.heldout, *heldout_windows(recipe.training))
    with console.status("compressing the held-out text, and the training text before it"):
        compressed = compressors(corpus)
    sample = runtime.generate(PROMPT, max_new_tokens=SAMPLE_TOKENS, temperature=0.7, top_p=0.9, seed=0)
    differing = [i for i, pair in enumerate(zip(torch_tokens, runtime_tokens, strict=True)) if pair[0] != pair[1]]
    return {
        "text": trained.record["settings"]["corpus"],
        "training": {key: trained.record[key] for key in ("steps", "seconds", "parameters", "precision", "versions")},
        "loss": [[entry["step"], entry["loss"]] for entry in trained.history if "loss" in entry],
        "bits_per_byte": {"torch": trained.record["bits_per_byte"], "packed": packed_bits, **compressed},
        "bytes": {"fp32": 4 * trained.record["parameters"], "packed": (packed / "model.safetensors").stat().st_size},
        "tokens_per_second": speeds,
        "parity": agreement,
        "greedy": {"tokens": GREEDY_TOKENS, "equal": not differing, "first_difference": next(iter(differing), None)},
        "sample": {"prompt": PROMPT, "text": sample},
        "isa": native.isa(),
        "threads": native.default_threads(),
    }


def dense_twin(model: Any) -> Any:
    """A model of the same shape with plain float32 matrices: what torch does when nothing is quantised."""
    from thrifty.models import ThriftyConfig, ThriftyForCausalLM

    fields = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    return ThriftyForCausalLM(ThriftyConfig(**{**fields, "linear": "dense"}))


def parity(model: Any, runtime: "Runtime", tokens: list[int]) -> dict[str, int]:
    """At how many positions of a text both find the same token likeliest, given what stands before.

    Clear are the positions where torch's margin between its two best logits exceeds `CLEAR_MARGIN` of the range of the
    position's logits; only there a difference is a mismatch.
    """
    import numpy as np
    import torch

    with torch.inference_mode():
        theirs = model(torch.tensor([tokens])).logits[0].float().numpy()
    second, best = np.partition(theirs, -2)[:, -2:].T
    clear = best - second > CLEAR_MARGIN * np.ptp(theirs, -1)
    differs = theirs.argmax(-1) != runtime.logits(tokens).argmax(-1)
    return {"positions": len(tokens), "clear": int(clear.sum()), "mismatches": int((clear & differs).sum())}


def tokens_per_second(generate: "Callable[[int], object]") -> float:
    """How fast `generate(count)` makes tokens: the median of some runs, after a short one that warms up."""
    import statistics
    import time

    generate(8)
    seconds = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        generate(TIMED_TOKENS)
        seconds.append(time.perf_counter() - start)
    return TIMED_TOKENS / statistics.median(seconds)


def greedy_in_torch(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after `prompt`, one by one over a cache of keys and values."""
    import torch

    tokens: list[int] = []
    fed, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(count):
            out = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens.append(int(out.logits[0, -1].argmax()))
            fed = torch.tensor([tokens[-1:]])
    return tokens


def greedy_in_runtime(runtime: "Runtime", prompt: list[int], count: int) -> list[int]:
    """The same by the runtime."""
    return runtime.generate_tokens(
        prompt, max_new_tokens=count, temperature=0.0, repetition_penalty=1.0, ignore_eos=True
    )


def compressors(corpus: "Corpus") -> dict[str, float]:
    """Bits per byte of the held-out text by gzip -9, xz -9, and xz -9 that has read the training text before."""
    import gzip
    import lzma
    from concurrent.futures import ThreadPoolExecutor

    heldout, training = corpus.heldout.encode(), corpus.text.encode()
    # The dictionary must reach back over the whole training text.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(1 << 26, 2 * len(training))}]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, filters=filters))

    with ThreadPoolExecutor(2) as pool:
        alone, after = pool.map(size, (training, training + heldout))
    return {
        "gzip -9": 8 * len(gzip.compress(heldout, 9, mtime=0)) / len(heldout),
        "xz -9": 8 * len(lzma.compress(heldout, preset=9)) / len(heldout),
        "xz -9 primed": 8 * (after - alone) / len(heldout),
    }
