"""`thrifty generate`: continue a prompt."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from thrifty.cli.options import GenerationOptions, takes_options

EPILOG = """Examples:

thrifty generate runs/notes-packed "Once upon a time"

thrifty generate runs/notes-packed "The parser" --temperature 0.8 --top-p 0.95

cat letter.txt | thrifty generate runs/notes-packed -
"""


@takes_options(GenerationOptions)
def main(
    model: Annotated[Path, typer.Argument(help="Folder, .gguf file or hub id of a model.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")] = "",
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    *,
    options: GenerationOptions,
) -> None:
    """Continue a prompt, printing the text as it is made.

    Options left out are those of the model's generation_config.json. Speed goes to standard error.
    """
    from thrifty.runtime import Drafting

    runtime = options.load(model)
    if prompt == "-":
        prompt = sys.stdin.read()
    begun, count = time.perf_counter(), 0
    choice = options.choice()
    choice["draft"] = drafting = Drafting(options.draft)
    tokens = runtime.stream_tokens(prompt, **choice)

    def counted():
        nonlocal count
        for token in tokens:
            count += 1
            yield token

    if echo:
        print(prompt, end="", flush=True)
    for piece in runtime.text_of(counted(), stop or ()):
        print(piece, end="", flush=True)
    print()
    seconds = time.perf_counter() - begun
    if count == runtime.room(prompt):
        print(f"the context of {runtime.max_context} is full, and the text ends there", file=sys.stderr)
    drafts = f", {drafting.accepted} of {drafting.proposed} drafted tokens accepted" if options.draft else ""
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s{drafts}", file=sys.stderr)
