"""`thrifty generate`: continue a prompt."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

thrifty generate runs/notes-packed "Once upon a time"

thrifty generate runs/notes-packed "The parser" --temperature 0.8 --top-p 0.95 --seed 1

cat letter.txt | thrifty generate runs/notes-packed -
"""


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a packed model, or of a trained one.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Most tokens to add.", show_default="256")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="Spread of the choice; 0 takes the most likely token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most likely tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest tokens of this probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1, tokens seen become less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    weight_format: Annotated[str, typer.Option(help="Weights in memory: auto, i2 (2 bits) or base3 (1.6).")] = "auto",
    head_bits: Annotated[int, typer.Option(help="Bits of the output head in memory: 8, 4, or 16 for as stored.")] = 8,
    cache_bits: Annotated[int, typer.Option(help="Bits of cached keys and values: 32, 16 or 8.")] = 16,
    threads: Annotated[int | None, typer.Option(help="Threads; by default the physical cores.")] = None,
    context: Annotated[int | None, typer.Option(help="Positions to make room for; by default the model's.")] = None,
) -> None:
    """Continue a prompt, printing the text as it is made.

    Options left out are those of the model's generation_config.json. Speed goes to standard error.
    """
    from thrifty.runtime import load

    bits = None if head_bits == 16 else head_bits
    runtime = load(
        model,
        weight_format=weight_format,
        n_threads=threads,
        max_context=context,
        head_bits=bits,
        cache_bits=cache_bits,
    )
    if prompt == "-":
        prompt = sys.stdin.read()
    begun, count = time.perf_counter(), 0
    tokens = runtime.stream_tokens(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )

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
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)
