"""Tasks of lm-evaluation-harness for torch folders and for the runtime."""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from thrifty.cli.eval import Place, load_runtime, load_torch
from thrifty.errors import ThriftyError

#: Tokens that go through a torch model together.
BATCH_TOKENS = 4096


def evaluate(
    places: Sequence[Place],
    tasks: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    bits: tuple[int, int],
    threads: int | None,
) -> dict[str, Any]:
    """Results by model, task and metric. Raises ThriftyError where a task cannot be had."""
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, include_path)
    simple_evaluate: Any = lm_eval.simple_evaluate
    models = []
    for place in places:
        model = _runtime(place, bits, threads) if place.engine == "runtime" else _torch(place, threads)
        try:
            found = simple_evaluate(
                model=model, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, task_manager=manager
            )
        except ThriftyError:
            raise
        except Exception as problem:
            sentence = _sentence(problem, tasks)
            if sentence is None:
                raise
            raise ThriftyError(sentence) from problem
        counts = {name: samples["effective"] for name, samples in found["n-samples"].items()}
        results = {name: _metrics(metrics) for name, metrics in found["results"].items()}
        row = {"model": place.name, "weights": place.weights, "engine": place.engine}
        models.append(row | {"examples": counts, "results": results})
    return {"lm_eval": lm_eval.__version__, "limit": limit, "num_fewshot": num_fewshot, "models": models}


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """What finds tasks. Raises ThriftyError for a name that it does not know."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ThriftyError(f"[eval] --include-path must be a folder; {include_path} is none; check the path")
    # To read the harness's own tasks, thousands of files, takes seconds: only where they are asked for.
    manager = TaskManager(include_path=include_path and str(include_path), include_defaults=False)
    if any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=include_path and str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, 1)
        hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists those there are"
        raise ThriftyError(f"[eval] a task must be one of lm_eval or of --include-path; got {unknown[0]!r}; {hint}")
    return manager


def _runtime(place: Place, bits: tuple[int, int], threads: int | None) -> Any:
    from thrifty.runtime.harness import RuntimeLM

    return RuntimeLM(load_runtime(place, bits, threads))


def _torch(place: Place, threads: int | None) -> Any:
    """The harness's own wrapping of a transformers model, with the tokenizer that the runtime reads."""
    from lm_eval.models import huggingface
    from transformers import PreTrainedTokenizerFast

    from thrifty.runtime.text import read_tokenizer
    from thrifty.train.evaluate import start_token

    tokenizer, model = read_tokenizer(place.folder), load_torch(place, threads)
    start = start_token(model)
    if tokenizer is None or start is None:
        lacks = "tokenizer.json" if tokenizer is None else "token that begins or ends a text"
        raise ThriftyError(f"[eval] tasks need a tokenizer and a start token; {place.name} has no {lacks}")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = wrapped.convert_ids_to_tokens(start)
    wrapped.add_special_tokens({"bos_token": text, "eos_token": text, "pad_token": text})
    size = max(1, BATCH_TOKENS // int(model.config.max_position_embeddings))
    wrap: Any = huggingface.HFLM
    return wrap(pretrained=model, backend="causal", tokenizer=wrapped, batch_size=size)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """Numbers by metric, named as the harness prints them; those of a filter by "metric (filter)"."""
    metrics = {}
    for key, value in found.items():
        name, _, kind = key.partition(",")
        if kind and isinstance(value, int | float):
            metric = name.removesuffix("_stderr")
            label = metric if kind == "none" else f"{metric} ({kind})"
            metrics[label + name.removeprefix(metric)] = float(value)
    return metrics


def _sentence(problem: Exception, tasks: Sequence[str]) -> str | None:
    """What to say of a task that cannot be had or done; None for a defect."""
    named = ", ".join(tasks)
    if isinstance(problem, AssertionError) and "max tokens to generate" in str(problem):
        return f"[eval] the new tokens of {named} must fit the context; {problem}"
    # What a data set that cannot be had raises: datasets' errors are OSErrors, as are those of a connection.
    if isinstance(problem, OSError):
        return f"[eval] the data of {named} must be at hand or in reach; {problem}; check the connection or the path"
    return None
