"""The NEON kernels, cross-compiled and run under qemu where this machine is no ARM."""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from thrifty import spec
from thrifty.native import ACTIVATION_IDS
from thrifty.native._library import FORMAT_IDS

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = Path(__file__).parents[2]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
FLAGS = ["-std=c++17", "-O2", "-static", "-ffp-contract=off", "-DTHRIFTY_BUILD_NEON", *WARNINGS]


def fields(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


def matmul_case(rng: np.random.Generator, fmt: str, rows: int, cols: int, n: int, full: int = 0) -> bytes:
    """`full` 0 draws the operands; +-1 saturates them with that weight."""
    record = spec.FORMATS[fmt]
    stride = record.padded(rows, cols)[1]
    w = np.full((rows, cols), full, np.int8) if full else rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    x = np.zeros((n, stride), np.int8)
    x[:, :cols] = np.where(rng.random((n, 1)) < 0.5, -128, 127) if full else rng.integers(-127, 128, (n, cols))
    w_scale = rng.uniform(0.01, 2, rows if n % 2 else 1).astype(np.float32)
    bias, x_scales = rng.standard_normal(rows).astype(np.float32), rng.uniform(1e-3, 2, n).astype(np.float32)
    y = spec.ternary_matmul(x[:, :cols], x_scales, w, w_scale, bias)
    arrays = (w, spec.pack(record, w), w_scale, bias, x, x_scales, y)
    return fields(0, FORMAT_IDS[fmt], rows, cols, n, stride, len(w_scale)) + b"".join(a.tobytes() for a in arrays)


def quantize_case(rng: np.random.Generator, n: int, d: int, norm: bool) -> bytes:
    x, gain = rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal(d).astype(np.float32)
    x[0] = 0
    codes, scales = spec.quantize_per_token(x, gain if norm else None, norm=norm)
    arrays = (x, gain, codes, scales, spec.rms_norm(x, gain))
    return fields(1, n, d, norm) + b"".join(a.tobytes() for a in arrays)


def glu_case(rng: np.random.Generator, count: int, act: str) -> bytes:
    """The float ops are one text over a class of sixteen floats; ARM runs it on plain C++."""
    gate, up = (rng.standard_normal((2, count)) * 4).astype(np.float32)
    y = spec.glu(gate, up, act).astype(np.float32)
    tolerance = np.full(1, spec.TOLERANCES["float32"] * max(1, np.abs(y).max()), np.float32)
    return fields(2, count, ACTIVATION_IDS[act]) + b"".join(a.tobytes() for a in (gate, up, y, tolerance))


def test_neon_equals_the_spec(tmp_path, rng, report_path):
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this machine runs NEON itself")
    absent = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if absent:
        report_path("neon", f"needs {' and '.join(absent)}")
        pytest.skip(f"uncovered: neon (needs {' and '.join(absent)})")
    sizes = (1, 3, 63, 257, 500)
    cases = [
        matmul_case(rng, fmt, rows, cols, n)
        for fmt in ("i2", "base3")
        for rows in sizes
        for cols in sizes
        for n in (1, 2, 5)
    ]
    cases += [matmul_case(rng, fmt, 17, 3000, 4, full) for fmt in ("i2", "base3") for full in (-1, 1)]
    cases += [quantize_case(rng, n, d, norm) for n in (1, 3) for d in (*sizes, 16, 2560) for norm in (True, False)]
    cases += [glu_case(rng, count, act) for count in (*sizes, 16) for act in spec.ACTIVATIONS]
    (tmp_path / "cases").write_bytes(b"".join(cases))

    csrc = ROOT / "csrc"
    sources = [*csrc.glob("*.cpp"), *csrc.glob("*/generic.cpp"), *csrc.glob("*/neon.cpp")]
    driver = tmp_path / "driver"
    command = [COMPILER, *FLAGS, f"-I{csrc / 'include'}", Path(__file__).parent / "neon_driver.cpp", *sources]
    built = subprocess.run([*command, "-o", driver], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([EMULATOR, driver, tmp_path / "cases"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["generic", "neon", str(len(cases))]
    report_path("neon")
