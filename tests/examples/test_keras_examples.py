"""Every Keras example runs with sizes of seconds, and its packed net answers as the one that was trained."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NETS = {
    "keras_digits": ["plain", "ternary"],
    "keras_vision_transformer": ["plain", "ternary"],
    "keras_autoencoder": ["plain", "ternary"],
    "keras_time_series": ["GRU", "GRUMML", "LRUMML"],
    "keras_byte_language_model": ["plain", "ternary"],
}
# One process, as much of the time goes into imports; most of the rest goes into compiling, so that is kept short.
RUN = """
import runpy, sys
examples, out, *names = sys.argv[1:]
sys.path.insert(0, examples)
for name in names:
    print(f"\\n== {name}")
    sys.argv = [name, "--short", "--out", f"{out}/{name}"]
    runpy.run_path(f"{examples}/{name}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that the examples wrote to, and what each of them printed."""
    out = tmp_path_factory.mktemp("keras")
    command = [sys.executable, "-c", RUN, EXAMPLES, out, *NETS]
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, dict(part.split("\n", 1) for part in done.stdout.split("\n== ")[1:])


@pytest.mark.parametrize("name", NETS)
def test_packed_answers_agree_and_sizes_shrink(name, runs):
    out, printed = runs
    assert re.match(r"Keras \S+ on jax\n", printed[name])
    packed = re.findall(r"(\w+): saved, loaded, packed, saved and loaded; .* at the median by (\S+)", printed[name])
    assert [net for net, _ in packed] == [net for net in NETS[name] if net not in ("plain", "GRU")]
    assert all(float(difference) < 1e-5 for _, difference in packed)
    lines = [line.strip("| ").split(" | ") for line in (out / f"{name}.md").read_text().splitlines()]
    rows = {cells[0]: [float(cell) for cell in cells[-3:]] for cells in lines[2 : 2 + len(NETS[name])]}
    assert list(rows) == NETS[name]
    for net, _ in packed:
        floats, _, matrices = rows[net]
        assert matrices < floats
    assert (out / f"{name}.png").stat().st_size > 0
