"""Runs a test body once per implementation, and holds the run to the paths that this machine has."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest

from thrifty import native
from thrifty.native import _library

#: numpy, which stands in where there is no library, and every instruction set of this processor: one that the build
#: left out fails.
IMPLEMENTATIONS = ("numpy", *native.detected_isas())

#: Rows or columns: one, odd, around powers of two, none of them a multiple of a block.
UGLY = (1, 3, 63, 257, 500)

_covered: dict[str, set[str]] = {}
_uncovered: dict[str, str] = {}
_complete = {"run": False}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of the implementation that the calls of the test run on."""
    name = request.param
    if name == "numpy":
        monkeypatch.setattr(_library, "find", lambda: (None, "taken away for a test"))
        _library.load.cache_clear()
    else:
        native.select_isa(name)
        assert native.isa() == name
    yield name
    monkeypatch.undo()
    _library.load.cache_clear()
    native.select_isa(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    # A path is covered once a body that ran on it has passed.
    if report.when == "call" and report.passed and "implementation" in getattr(item, "fixturenames", ()):
        name = item.callspec.params["implementation"]  # pyright: ignore[reportAttributeAccessIssue]
        _covered.setdefault(name, set()).add(item.path.stem.removeprefix("test_"))
    return report


@pytest.fixture
def report_path() -> Callable[[str, str], None]:
    """Tells the summary of a path outside this process: covered by a test file, or uncovered for a reason."""

    def report(name: str, reason: str = "") -> None:
        if reason:
            _uncovered[name] = reason
        else:
            _covered.setdefault(name, set()).update({"ternary_matmul", "quantize_per_token"})

    return report


class Guarded:
    """A poisoned array between guard bytes, for a function that writes through an address."""

    def __init__(self, shape: tuple[int, ...], dtype: type):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._bytes = np.full(count + 128, 0xAA, np.uint8)
        self.array = self._bytes[64 : 64 + count].view(dtype).reshape(shape)
        if np.issubdtype(dtype, np.floating):
            self.array[...] = np.nan

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def intact(self) -> bool:
        return bool((self._bytes[:64] == 0xAA).all() and (self._bytes[-64:] == 0xAA).all())


@pytest.fixture
def guarded() -> Callable[..., Guarded]:
    return Guarded


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    narrowed = config.option.keyword or config.option.markexpr or any("::" in arg for arg in config.args)
    files = {item.path.stem for item in items if "native" in item.path.parts}
    _complete["run"] = not narrowed and {"test_ternary_matmul", "test_quantize_per_token"} <= files


def _missing() -> dict[str, set[str]]:
    wanted = {"ternary_matmul", "quantize_per_token"}
    return {name: wanted - _covered.get(name, set()) for name in IMPLEMENTATIONS if wanted - _covered.get(name, set())}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # A run that broke off says nothing about coverage.
    _complete["run"] &= exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    _complete["run"] &= not session.config.option.collectonly
    if _complete["run"] and _missing():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, operations in _covered.items():
        terminalreporter.write_line(f"native: covered {name} ({', '.join(sorted(operations))})")
    for name, reason in _uncovered.items():
        terminalreporter.write_line(f"native: uncovered: {name} ({reason})")
    if _complete["run"]:
        for name, operations in _missing().items():
            terminalreporter.write_line(f"native: FAILED, {name} was not covered by {', '.join(sorted(operations))}")
