"""The NEON kernels, cross-compiled and run under qemu where this machine is no ARM."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native_cases import single_cases, write

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = Path(__file__).parents[2]
OTHERS = ("avx2", "avx512", "avx512_vbmi", "amx")
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
FLAGS = ["-std=c++17", "-O2", "-static", "-ffp-contract=off", "-DTHRIFTY_BUILD_NEON", *WARNINGS]


def test_neon_equals_the_spec(tmp_path, rng, report_path):
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this machine runs NEON itself")
    absent = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if absent:
        report_path("neon", f"needs {' and '.join(absent)}")
        pytest.skip(f"uncovered: neon (needs {' and '.join(absent)})")
    # The float ops of a step are one text over a class of sixteen floats; ARM runs it on plain C++.
    cases = list(single_cases(rng))
    write(tmp_path / "cases", cases)

    csrc = ROOT / "csrc"
    sources = [f for f in csrc.rglob("*.cpp") if f.stem not in OTHERS]
    driver = tmp_path / "driver"
    command = [COMPILER, *FLAGS, f"-I{csrc / 'include'}", Path(__file__).parent / "driver.cpp", *sources]
    built = subprocess.run([*command, "-o", driver], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([EMULATOR, driver, tmp_path / "cases"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["generic", "neon", str(len(cases))]
    report_path("neon")
