"""`thrifty chat`: talk with a model in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from thrifty.cli.options import GenerationOptions, takes_options

EPILOG = """Examples:

thrifty chat runs/notes-packed

thrifty chat runs/notes-packed --system "Be brief." --temperature 0.7
"""

_HELP = "/reset forgets the conversation · /quit ends it · Ctrl-C stops an answer"


@takes_options(GenerationOptions)
def main(
    model: Annotated[Path, typer.Argument(help="Folder, .gguf file or hub id of a model.", show_default=False)],
    system: Annotated[str | None, typer.Option(help="First message, which sets the tone.")] = None,
    *,
    options: GenerationOptions,
) -> None:
    """Talk with a model: its chat template, streaming answers, and a cache that keeps the conversation.

    /reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C stops an answer and keeps what was said.
    """
    from rich.console import Console

    from thrifty.errors import ThriftyError
    from thrifty.runtime import Conversation

    runtime = options.load(model)
    # A template that cannot be rendered ends the command, not every turn.
    runtime.chat_prompt([{"role": "user", "content": "hello"}])
    conversation = Conversation(runtime, system, **options.choice())
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
                if conversation.full:
                    notes.print(
                        f"the context of {runtime.max_context} is full: the answer ends there (/reset)", style="red"
                    )
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
