"""`make test-sanitize`: builds the driver of tests/native under each sanitizer and runs the cases of the spec in it.

A compiler that has one of the sanitizers and lacks another fails; without any, they are uncovered.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from native_cases import refused_cases, single_cases, write
from native_states import state_cases
from native_steps import step_cases

ROOT = Path(__file__).parents[1]
#: Sanitizers that go into one build. Casts of floats out of range are undefined too, though not part of `undefined`.
BUILDS = {"address": "address,undefined,float-cast-overflow", "thread": "thread"}


def available(sanitizers: str, folder: Path) -> bool:
    """Whether the compiler makes a program with them that runs."""
    compiler, program = os.environ.get("CXX", "c++"), folder / "probe"
    if shutil.which(compiler) is None:
        return False
    command = [compiler, "-x", "c++", f"-fsanitize={sanitizers}", "-", "-o", str(program)]
    built = subprocess.run(command, input=b"int main() {}", capture_output=True)
    return built.returncode == 0 and subprocess.run([program]).returncode == 0


def build(name: str, sanitizers: str, folder: Path) -> Path:
    """The driver, built under the sanitizers; warnings are errors."""
    tree = folder / name
    options = {
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_FLAGS": "-O1",
        "THRIFTY_SANITIZE": sanitizers,
    }
    configure = ["cmake", "-S", ROOT, "-B", tree, *(f"-D{key}={value}" for key, value in options.items())]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", tree, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return tree / "driver"


def main() -> None:
    folder = ROOT / "build" / "sanitize"
    folder.mkdir(parents=True, exist_ok=True)
    lacking = [name for name, sanitizers in BUILDS.items() if not available(sanitizers, folder)]
    if len(lacking) == len(BUILDS):
        print("native: uncovered: sanitizers (there is no compiler that has any)")
        return
    if lacking:
        sys.exit(f"native: FAILED, the compiler lacks -fsanitize={BUILDS[lacking[0]]}")
    rng = np.random.default_rng(7)
    write(folder / "cases", [*single_cases(rng), *step_cases(rng), *state_cases(rng), *refused_cases()])
    for name, sanitizers in BUILDS.items():
        driver = build(name, sanitizers, folder)
        print(f"native: under {name}: ", end="", flush=True)
        if subprocess.run([driver, folder / "cases", "shared"]).returncode != 0:
            sys.exit(f"native: FAILED under {name}")


if __name__ == "__main__":
    main()
