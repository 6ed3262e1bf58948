"""Teaching a trained model to answer: SFT, then DPO, and adapters beside packed layers.

    python examples/answers.py MODEL [--out runs/answers] [--rows 600]

Rows are made of Python's help topics, the same in every run: a person gives the first half of a sentence, the
assistant says the second (sft, lora); or it says that of another sentence, which is to be avoided (dpo). What came out
is printed: the loss, or margin, of rows held out before and after, and the bytes of weights while training. Needs
`thrifty[post]`.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from thrifty.models import ThriftyConfig
from thrifty.nn import PackedBitLinear
from thrifty.train.recipe import find_recipe
from thrifty.train.tuning import TuningResult, tune


def halves() -> list[tuple[str, str]]:
    """Sentences of the help topics, of 8 to 30 words, in two."""
    text = re.sub(r"\s+", " ", " ".join(topics.values()))
    sentences = [s.split() for s in re.findall(r"[A-Z][a-z][^.*|]{40,200}\.", text)]
    return [(" ".join(s[: len(s) // 2]), " ".join(s[len(s) // 2 :])) for s in sentences if 8 <= len(s) <= 30]


def write_rows(folder: Path, count: int) -> tuple[Path, Path]:
    """Files of conversations, and of answers with preferences."""
    rng = random.Random(0)
    pairs = halves()
    rng.shuffle(pairs)
    asked = [{"role": "user", "content": f"Go on: {first}"} for first, _ in pairs[:count]]
    told = [{"role": "assistant", "content": second} for _, second in pairs[:count]]
    talks = [{"messages": [question, answer]} for question, answer in zip(asked, told, strict=True)]
    others = [*told[1:], told[0]]
    preferences = [
        {"prompt": [question], "chosen": [answer], "rejected": [other]}
        for question, answer, other in zip(asked, told, others, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "talks.jsonl", folder / "pairs.jsonl"
    for file, rows in zip(files, (talks, preferences), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def report(name: str, result: TuningResult) -> Iterator[str]:
    """What a run changed of the rows held out, and what it held."""
    for key in ("loss", "rewards/margins"):
        seen = [entry[f"eval_{key}"] for entry in result.history if f"eval_{key}" in entry]
        if seen:
            yield f"{name:5} {key:16} {seen[0]:8.3f} -> {seen[-1]:8.3f}"
    packed = [module.packed.numel() for module in result.model.modules() if isinstance(module, PackedBitLinear)]
    trained = 4 * result.record["parameters"]["trained"]
    held = f"{sum(packed) / 1e6:.2f} MB of packed layers, " if packed else ""
    yield f"{name:5} {held}{trained / 1e6:.2f} MB of weights that are trained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("--out", type=Path, default=Path("runs/answers"))
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of every recipe")
    options = parser.parse_args()
    talks, pairs = write_rows(options.out, options.rows)
    positions = ThriftyConfig.from_pretrained(options.model).max_position_embeddings
    common = {"sequence_length": min(128, positions), **dict(field.split("=", 1) for field in options.set)}
    starts = {"sft": options.model, "dpo": options.out / "sft", "lora": options.model}
    for name, start in starts.items():
        recipe = find_recipe(name).override(**common)
        result = tune(start, [pairs if name == "dpo" else talks], recipe, options.out / name, heldout=0.15)
        print("\n".join(report(name, result)))


if __name__ == "__main__":
    main()
