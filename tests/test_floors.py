"""A floor imports only lower floors, and neighbours never import each other (docs/how-it-works.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import thrifty

FLOORS = {
    "errors": -1,
    "spec": 0,
    "native": 1,
    "checkpoint": 1,
    "convert": 2,
    "runtime": 2,
    "ops": 2,
    "nn": 3,
    "keras": 3,
    "models": 4,
    "train": 5,
    "cli": 6,
    "__main__": 7,
}
ROOT = Path(thrifty.__file__).parent


def imports(file: Path) -> set[str]:
    """Top-level parts of this package that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.module != "thrifty" else [f"thrifty.{a.name}" for a in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("thrifty.")}
    return parts - {"ThriftyError", "__version__"}


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file):
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    for other in imports(file) - {part}:
        assert FLOORS[other] < FLOORS[part], f"{file.relative_to(ROOT)} (floor {FLOORS[part]}) imports thrifty.{other}"


@pytest.mark.parametrize("module", ["thrifty", "thrifty.runtime", "thrifty.cli"])
def test_importing_brings_in_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'keras', 'jax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_import_takes_less_than_a_fifth_of_a_second():
    code = "import time; t = time.perf_counter(); import thrifty; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(times) < 0.2
