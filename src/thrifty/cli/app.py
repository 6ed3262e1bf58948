"""The command-line application: a table of subcommands, each a module that is imported only when called.

A subcommand `NAME` is the module `thrifty.cli.NAME`. Its function `main`, annotated for typer, is the command; the
docstring of that function is the help, and the module's `EPILOG`, where there is one, shows examples.
"""

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

import thrifty
from thrifty.errors import ThriftyError, ThriftyWarning

#: Seconds that the processes of a run leave to the first to say what is wrong.
PATIENCE = 5
#: Name of each subcommand, and its line in `thrifty --help`.
COMMANDS = {
    "train": "Train a ternary language model on text.",
    "pack": "Make the small copy of a trained model: two bits per weight.",
    "convert": "Write a model for transformers or llama.cpp, or read it from there.",
    "generate": "Continue a prompt with a packed model.",
    "chat": "Talk with a packed model in the terminal.",
    "eval": "Say how well models know a text, and what they score on tasks.",
    "report": "Write the page about a run: losses, rates, codes by layer, samples.",
    "bench": "Measure decode, prompts, memory and load beside what the machine could do at best.",
    "info": "Show versions, native code paths, installed extras, and what a model is made of.",
    "demo": "Train, pack and run a small model on the built-in text, and show what was gained.",
}

#: The extra (`pip install 'thrifty[EXTRA]'`) that brings a module this package imports only when needed. No command
#: needs torch without transformers.
EXTRA_OF = {
    "torch": "train",
    "transformers": "train",
    "accelerate": "train",
    "datasets": "train",
    "tensorboard": "train",
    "yaml": "train",
    "trl": "post",
    "peft": "post",
    "lm_eval": "harness",
    "matplotlib": "train",
    "keras": "keras",
    "jax": "jax",
    "tensorflow": "tensorflow",
    "jinja2": "chat",
}

HELP = """Train, pack and run language models that spend less: ternary weights, at the speed of the memory.

One flow runs through everything: text → train → pack → run.
"""

EPILOG = """Examples:

thrifty demo

thrifty train my-notes/ --output runs/notes

thrifty pack runs/notes runs/notes-packed

thrifty generate runs/notes-packed "Once upon a time"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 something the user can put right, 130 interrupted.

    `argv` is the list of arguments after the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    # `--debug` counts wherever it stands, so that it can be added at the end of the command that failed.
    debug = "--debug" in own
    arguments = [a for i, a in enumerate(arguments) if not (a == "--debug" and i < len(own))]
    selected = next((a for a in arguments if not a.startswith("-")), None)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show(warnings.showwarning)
            typer.main.get_command(application(selected))(args=arguments, prog_name="thrifty")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code == 130:
            print("interrupted", file=sys.stderr)
        return code
    except Exception as problem:
        sentence = describe(problem)
        if os.environ.get("RANK", "0") != "0":
            # What stops every process of a run is said by the first, and its end is the end of the others.
            time.sleep(PATIENCE)
        if debug or sentence is None:
            traceback.print_exc()
            return 2 if sentence else 1
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    return 0


def application(selected: str | None) -> typer.Typer:
    """The typer application, in which only the subcommand `selected` has been imported."""
    app = typer.Typer(
        help=HELP,
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name, summary in COMMANDS.items():
        if name == selected:
            module = import_module(f"thrifty.cli.{name}")
            epilog = getattr(module, "EPILOG", None)
            app.command(name, help=_joined(module.main), short_help=summary, epilog=epilog)(module.main)
        else:
            app.command(name, help=summary)(_placeholder())
    return app


def describe(problem: Exception) -> str | None:
    """One sentence for what a user can put right, or None for a defect of this package."""
    if isinstance(problem, ThriftyError):
        return " ".join(str(problem).split())
    if isinstance(problem, ModuleNotFoundError) and problem.name:
        module = problem.name.split(".")[0]
        if module in EXTRA_OF:
            return f"this command needs {module}, which is not installed; pip install 'thrifty[{EXTRA_OF[module]}]'"
    if isinstance(problem, OSError) and problem.errno is not None:
        return f"{problem.strerror}: {problem.filename}" if problem.filename else str(problem.strerror)
    if isinstance(problem, MemoryError):
        # numpy says how much it asked for.
        what = " ".join(str(problem).split()) or "no more could be had"
        return f"the memory does not suffice: {what}; choose a smaller model, batch or context"
    return None


def _show(others: Callable[..., Any]) -> Callable[..., Any]:
    """How a warning is shown: one of this package is a sentence, like an error."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, ThriftyWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            others(message, category, *place)

    return show


def _joined(command: Callable[..., Any]) -> str:
    """The docstring of a command with each paragraph in one line: typer keeps the line breaks of all but the first."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


def _placeholder() -> Callable[[], None]:
    def command() -> None:
        """Stands in the list for a subcommand that was not called."""

    return command


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"thrifty {thrifty.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, not only its sentence.")
    ] = False,
) -> None:
    # `main` has taken `--debug` out already: it is declared here for the help.
    del version, debug
