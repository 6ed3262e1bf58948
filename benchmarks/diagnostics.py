"""What looking at a run costs: a look at the codes and a sampling beside a training step, for a recipe that ships."""

import argparse
import statistics
import time
from collections.abc import Callable

from thrifty.train.process import prepare_process

prepare_process()

from thrifty.train import diagnostics  # noqa: E402
from thrifty.train.initial import initialize, new_model  # noqa: E402
from thrifty.train.recipe import find_recipe  # noqa: E402
from thrifty.train.tokenizer import SMALLEST, train_tokenizer  # noqa: E402
from thrifty.train.trainer import seconds_per_step  # noqa: E402


def seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """Median time of `run`, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    recipe = find_recipe(parser.parse_args().recipe)
    if recipe.shape is None:
        parser.error("the recipe must have a shape")
    training, tokenizer = recipe.training, train_tokenizer([], SMALLEST)
    model = new_model(recipe.shape, tokenizer)
    initialize(model, training)
    model.train()
    watch = diagnostics.Diagnostics(tokenizer, None, training, 1.0)
    watch.on_train_begin(None, None, None, model=model)
    step = seconds_per_step(model, training)
    look = seconds(lambda: watch._look(model))
    sampling = seconds(lambda: diagnostics.continuations(model, [list(range(diagnostics.PROMPT))] * 2), 3)
    interval = diagnostics.look_interval(training.steps, training.save_every)
    apart = max(training.steps // diagnostics.SAMPLINGS, diagnostics.APART)
    print(f"{recipe.name}: a step takes {1e3 * step:.1f} ms")
    print(
        f"a look     {1e3 * look:7.1f} ms, every {interval:4} steps: {100 * look / interval / step:.2f} % of the time"
    )
    print(
        f"a sampling {1e3 * sampling:7.1f} ms, every {apart:4} steps: {100 * sampling / apart / step:.2f} % of the time"
    )


if __name__ == "__main__":
    main()
