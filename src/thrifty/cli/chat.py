"""`thrifty chat`: talk with a model in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

thrifty chat runs/notes-packed

thrifty chat runs/notes-packed --system "Answer in one sentence." --temperature 0.7
"""

_HELP = "/reset forgets the conversation · /quit ends it · Ctrl-C stops an answer"


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a packed model, or of a trained one.", show_default=False)],
    system: Annotated[str | None, typer.Option(help="First message, which sets the tone.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Most tokens of an answer.", show_default="256")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="Spread of the choice; 0 takes the most likely token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most likely tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest tokens of this probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1, tokens seen become less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    weight_format: Annotated[str, typer.Option(help="Weights in memory: auto, i2 (2 bits) or base3 (1.6).")] = "auto",
    head_bits: Annotated[int, typer.Option(help="Bits of the output head in memory: 8, 4, or 16 for as stored.")] = 8,
    cache_bits: Annotated[int, typer.Option(help="Bits of cached keys and values: 32, 16 or 8.")] = 16,
    threads: Annotated[int | None, typer.Option(help="Threads; by default the physical cores.")] = None,
    context: Annotated[int | None, typer.Option(help="Positions to make room for; by default the model's.")] = None,
) -> None:
    """Talk with a model: its chat template, streaming answers, and a cache that keeps the conversation.

    /reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C stops an answer and keeps what was said.
    """
    from rich.console import Console

    from thrifty.errors import ThriftyError
    from thrifty.runtime import Conversation, load

    runtime = load(
        model,
        weight_format=weight_format,
        n_threads=threads,
        max_context=context,
        head_bits=None if head_bits == 16 else head_bits,
        cache_bits=cache_bits,
    )
    # A template that cannot be rendered ends the command, not every turn.
    runtime.chat_prompt([{"role": "user", "content": "hello"}])
    conversation = Conversation(
        runtime,
        system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    console, notes = Console(highlight=False, markup=False), Console(stderr=True, highlight=False)
    notes.print(_HELP, style="dim")
    while (text := _read(notes)) is not None:
        if text == "/reset":
            conversation.reset()
            notes.print("forgotten", style="dim")
        elif text.startswith("/"):
            notes.print(_HELP, style="dim")
        elif text:
            try:
                _answer(conversation, text, console)
            except ThriftyError as error:
                notes.print(f"error: {error} (or /reset)", style="red", markup=False, soft_wrap=True)


def _read(notes) -> str | None:
    """The next message; None at the end of the conversation."""
    while True:
        try:
            text = notes.input("[bold cyan]› [/]").strip()
        except KeyboardInterrupt:
            notes.print()
            continue
        except EOFError:
            notes.print()
            return None
        return None if text in ("/quit", "/exit") else text


def _answer(conversation, text: str, console) -> None:
    """Print the answer as it comes; Ctrl-C ends it."""
    answer = conversation.ask(text)
    try:
        for piece in answer:
            console.print(piece, end="", soft_wrap=True)
            console.file.flush()
    except KeyboardInterrupt:
        pass
    finally:
        answer.close()
        console.print()
