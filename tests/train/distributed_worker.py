"""What two processes do for `test_distributed`: runs in one process group, and what they saw, as JSON."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from thrifty.train.process import is_first, prepare_process

prepare_process()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import distributed  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from thrifty.cli import main as cli  # noqa: E402
from thrifty.errors import ThriftyError  # noqa: E402
from thrifty.train import trainer  # noqa: E402
from thrifty.train.corpus import Corpus, Part  # noqa: E402
from thrifty.train.distributed import from_first  # noqa: E402
from thrifty.train.recipe import Recipe, find_recipe  # noqa: E402

TEXT = "".join(f"The {n}th line of a text that counts its lines.\n" for n in range(400))
CORPUS = Corpus("lines", (Part("text", (TEXT,)),), "The last line of a text.\n" * 20)
#: Rows that two do not divide (the embedding's) and that they do, columns that leave a byte of codes half full, and a
#: limit that clips every gradient.
MICRO = find_recipe("tiny").override(
    vocab_size=281,
    hidden_size=16,
    intermediate_size=34,
    max_position_embeddings=32,
    steps=4,
    batch_size=4,
    sequence_length=16,
    eval_every=2,
    save_every=2,
    clip=0.5,
    weight_decay=0.1,
)
EXPERTS = MICRO.override(model="doge", linear="ternary", keep_window_size=8, num_experts=25, num_experts_per_tok=3)


def run(output: Path, recipe: Recipe) -> list[float]:
    """The losses of a run, of training and held out."""
    result = trainer.train(CORPUS, recipe, output, console=Console(quiet=True))
    return [entry[key] for entry in result.history for key in ("loss", "eval_loss") if key in entry]


def cut(run: Path, copy: Path) -> None:
    """A copy of a run as it was after two of its four steps."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "checkpoint-4")


def refusal(refuse: Callable[[], Any]) -> str:
    """What is wrong, as this process hears it."""
    try:
        refuse()
    except ThriftyError as problem:
        return str(problem)
    return ""


def no() -> None:
    """What only the first process finds wrong."""
    raise ThriftyError("[train] no")


def bytes_gathered() -> list[int]:
    """A list that grows by the bytes of each gathering of parameters from now on."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    sizes: list[int] = []
    gather = DefaultAllGather.__call__

    def counted(self, output_tensor, *args, **kwargs):
        sizes.append(output_tensor.nbytes)
        return gather(self, output_tensor, *args, **kwargs)

    DefaultAllGather.__call__ = counted
    return sizes


def command(folder: Path) -> list[str]:
    """What the command wrote to standard output and to standard error."""
    from_first(partial((folder / "text.txt").write_text, TEXT))
    options = ["--recipe", "tiny", "--steps", "1", "--sequence-length", "16", "--set", "hidden_size=16"]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = cli(["train", str(folder / "text.txt"), *options, "--output", str(folder / "command")])
    return [str(code), out.getvalue(), err.getvalue()]


def main(folder: Path) -> None:
    """All scenarios; the first process writes what came of them."""
    seen: dict[str, Any] = {"batch": refusal(partial(run, folder / "none", MICRO.override(batch_size=5)))}
    seen["ddp"] = run(folder / "ddp", MICRO)
    seen["parts"] = run(folder / "parts", MICRO.override(accumulate=2))
    seen["experts"] = run(folder / "experts", EXPERTS)
    gathered = bytes_gathered()
    for sharding in ("fsdp", "fsdp-2bit"):
        gathered.clear()
        seen[sharding] = run(folder / sharding, MICRO.override(sharding=sharding))
        seen[f"{sharding} bytes"] = sum(gathered)
    for name in ("ddp", "fsdp-2bit"):
        from_first(partial(cut, folder / name, folder / f"{name} resumed"))
        # How a step is computed in parts may change from one session to the next.
        recipe = MICRO.override(sharding="none" if name == "ddp" else name, accumulate=2)
        seen[f"{name} resumed"] = run(folder / f"{name} resumed", recipe)
    seen["one to two"] = run(folder / "one to two", MICRO.override(sharding="fsdp-2bit"))
    seen["refusal"] = refusal(partial(from_first, no))
    heard: list = [None, None]
    distributed.all_gather_object(heard, (seen, command(folder)))
    if is_first():
        (folder / "seen.json").write_text(json.dumps(heard))


class Fails(TrainerCallback):
    """The second process fails in its second step, while the first waits for its gradients."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and not is_first():
            raise SystemExit(3)


def fail(folder: Path) -> None:
    make: Any = trainer.CausalTrainer.__init__

    def failing(self, callbacks, **kwargs) -> None:
        make(self, callbacks=[*callbacks, Fails()], **kwargs)

    trainer.CausalTrainer.__init__ = failing
    run(folder / "fails", MICRO)


if __name__ == "__main__":
    # What is compared is float32, whatever this machine computes fastest in.
    trainer.has_fast_bf16 = lambda: False
    torch.set_num_threads(1)
    {"main": main, "fail": fail}[sys.argv[1]](Path(sys.argv[2]))
