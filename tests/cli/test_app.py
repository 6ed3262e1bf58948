import subprocess
import sys
import time
from importlib import import_module
from itertools import pairwise

import pytest

from thrifty.cli import app, main
from thrifty.errors import ThriftyError

HEAVY = ("torch", "transformers", "numpy", "datasets", "matplotlib")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "thrifty", *arguments], capture_output=True, text=True)


def test_help_is_quick_and_imports_nothing_heavy():
    code = f"""
import sys
from thrifty.cli import main
main(["--help"])
print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)
"""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        assert done.stderr == "[]\n"
    assert min(seconds) < 0.5


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in app.COMMANDS)


@pytest.mark.parametrize("command", app.COMMANDS)
def test_help_fills_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    until = next(i for i, line in enumerate(lines) if line.startswith("╭"))
    texts = [line.strip() for line in lines[:until]]
    for line, after in pairwise(texts):
        # A line ends where the next word does not fit, and not in the middle.
        assert not (line and after) or len(f" {line} {after.split()[0]} ") > 80, (line, after)
    examples = [line for line in lines if line.startswith(f" thrifty {command}")]
    assert examples == [f" {line}".ljust(80) for line in epilog(command) if line.startswith(f"thrifty {command}")]


def epilog(command: str) -> list[str]:
    return import_module(f"thrifty.cli.{command}").EPILOG.splitlines()


def test_python_m_thrifty_is_the_command():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, "thrifty 0.1.0\n")


@pytest.mark.parametrize("arguments", [["nothing"], ["--nothing"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def raising(monkeypatch):
    """Makes `thrifty info` raise what it is given."""

    def make(problem: BaseException) -> None:
        def command() -> None:
            """Fail."""
            raise problem

        module = type(sys)("thrifty.cli.info")
        vars(module)["main"] = command
        monkeypatch.setitem(sys.modules, "thrifty.cli.info", module)

    return make


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (ThriftyError("[x] a rule;\n got y"), "[x] a rule; got y"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "No such file or directory: a.txt"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            MemoryError("Unable to allocate 3 TiB"),
            "the memory does not suffice: Unable to allocate 3 TiB; choose a smaller model, batch or context",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            "this command needs torch, which is not installed; pip install 'thrifty[train]'",
        ),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence(raising, capsys, problem, sentence):
    raising(problem)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize("arguments", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_the_traceback(raising, capsys, arguments):
    raising(ThriftyError("[x] a rule"))
    assert main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_shows_its_traceback(raising, capsys):
    raising(RuntimeError("a defect"))
    assert main(["info"]) == 1
    assert "RuntimeError: a defect" in capsys.readouterr().err


def test_an_interrupt_exits_with_130_and_one_line(raising, capsys):
    raising(KeyboardInterrupt())
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
