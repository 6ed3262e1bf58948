"""Options that several commands have, declared once: how a model is loaded, and how tokens are chosen."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from thrifty.runtime import Runtime


def takes_options(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declares the fields of a dataclass as options of a command, which gets them together as its `options`."""

    def declare(main: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(main).parameters.items() if name != "options"]
        shared = inspect.signature(kind).parameters

        @wraps(main)
        def command(**given: Any) -> None:
            options = kind(**{name: given.pop(name) for name in shared})
            main(**given, options=options)

        every = [*own, *shared.values()]
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in every}
        return command

    return declare


@dataclass(frozen=True)
class ModelOptions:
    """How a model lies in memory."""

    weight_format: Annotated[str, typer.Option(help="Weights in memory: auto, i2 (2 bits) or base3 (1.6).")] = "auto"
    head_bits: Annotated[int, typer.Option(help="Bits of the output head in memory: 8, 4, or 16 for as stored.")] = 8
    cache_bits: Annotated[int, typer.Option(help="Bits of cached keys and values: 32, 16 or 8.")] = 8

    def arguments(self) -> dict[str, Any]:
        """What `thrifty.runtime.load` takes."""
        bits = None if self.head_bits == 16 else self.head_bits
        return {"weight_format": self.weight_format, "head_bits": bits, "cache_bits": self.cache_bits}


@dataclass(frozen=True)
class ChoiceOptions:
    """How tokens are chosen."""

    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Most tokens of an answer.", show_default="256")
    ] = None
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="Spread of the choice; 0 takes the most likely token.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most likely tokens; 0 for all.")] = None
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest tokens of this probability.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1, tokens seen become less likely.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps a prompt's keys and values: what prompts begin with alike is computed once."
        ),
    ] = None
    draft: Annotated[
        int, typer.Option(min=0, help="Most tokens to guess at a time from earlier text; changes the speed alone.")
    ] = 0

    def choice(self) -> dict[str, Any]:
        """What `Runtime.stream_tokens` takes."""
        return {field.name: getattr(self, field.name) for field in fields(ChoiceOptions)}


# Python gives the fields of the last base first.
@dataclass(frozen=True)
class GenerationOptions(ModelOptions, ChoiceOptions):
    """How a model is loaded, and how it goes on."""

    threads: Annotated[int | None, typer.Option(help="Threads; by default the physical cores.")] = None
    context: Annotated[int | None, typer.Option(help="Positions to make room for; by default the model's.")] = None

    def load(self, model: Path) -> "Runtime":
        """The runtime of a folder."""
        from thrifty.runtime import load

        return load(model, n_threads=self.threads, max_context=self.context, **self.arguments())
