"""Every example runs from the command line with sizes of seconds, and leaves what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *options: object) -> str:
    command = [sys.executable, "-W", "error::UserWarning", EXAMPLES / f"{name}.py", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(file: Path) -> dict[str, list[float]]:
    """Numbers of a table by the name in the first column."""
    lines = [line.strip("| \n").split(" | ") for line in file.read_text().splitlines()[2:]]
    return {name: [float(cell.removesuffix(" M")) for cell in cells] for name, *cells in lines}


def test_mqar_learns_two_pairs_and_goes_on_where_it_stopped(tmp_path):
    sizes = ("--tokens", 8, "--pairs", 2, "--first", 1, "--vocab", 9, "--look", 2, "--minutes", 1, "--enough", 0.9)
    options = ("--mixers", "attention", *sizes, "--test", 64, "--out", tmp_path)
    run("mqar", *options)
    first = rows(tmp_path / "mqar.md")["attention"]
    assert first[0] > 0.85
    assert (tmp_path / "mqar.png").stat().st_size > 0
    assert "step" not in run("mqar", *options)[: -len((tmp_path / "mqar.md").read_text()) - 1]
    assert rows(tmp_path / "mqar.md")["attention"] == first


def test_mqar_knows_the_mixers(tmp_path):
    run("mqar", "--short", "--out", tmp_path)
    masks = {"dynamic_mask, w = 4", "dynamic_mask, w = 8", "dynamic_mask, w = 4, exact"}
    assert set(rows(tmp_path / "mqar.md")) == {"attention", *masks, "ssd", "mlgru"}


def test_mqar_soft_mask_hardens_into_the_exact_one_and_reaches_lost_keys():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import mqar, torch\n"
        "torch.manual_seed(0)\n"
        "soft = mqar.SoftMask(8, heads=1, window=3, bias=True)\n"
        "torch.nn.init.ones_(soft.A)\n"
        "x = torch.randn(2, 12, 8, requires_grad=True)\n"
        "rotary = torch.ones(1, 12, 4), torch.zeros(1, 12, 4)\n"
        "exact = soft.eval()(x, rotary)\n"
        "assert (soft.train()(x, rotary) - exact).abs().max() > 0.01\n"
        "soft.softness = 1e-6\n"
        "assert (soft(x, rotary) - exact).abs().max() < 1e-5\n"
        "lost = mqar.ops.kept_until(mqar.ops.key_scores(soft.v_proj(x)[:, None], soft.A, soft.dt_proj.weight, "
        "soft.dt_proj.bias), 3)[:, 0] <= 11\n"
        "for training in (False, True):\n"
        "    soft.train(training).softness = 1.0\n"
        "    grad, = torch.autograd.grad(soft(x, rotary)[:, 11].sum(), x)\n"
        "    assert bool((grad[:, :11][lost[:, :11]] != 0).any()) == training\n"
    )
    subprocess.run([sys.executable, "-c", code, EXAMPLES], check=True)


def test_mqar_texts_ask_for_what_they_told():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import mqar, numpy as np\n"
        "ids, labels = mqar.texts(50, 40, 7, 31, np.random.default_rng(0))\n"
        "for row, answers in zip(ids.tolist(), labels.tolist()):\n"
        "    told = dict(zip(row[0:14:2], row[1:14:2]))\n"
        "    assert len(told) == 7 and max(told) < 15 <= min(told.values())\n"
        "    asked = {row[i]: answers[i] for i in range(40) if answers[i] != -100}\n"
        "    assert asked == told and min(i for i in range(40) if answers[i] != -100) >= 14\n"
    )
    subprocess.run([sys.executable, "-c", code, EXAMPLES], check=True)


def test_doge_vs_dense_matches_parameters_and_arithmetic(tmp_path):
    sizes = ("--steps", 2, "--batch", 2, "--length", 32, "--window", 8, "--vocab", 300, "--dim", 32, "--layers", 2)
    out = tmp_path / "doge"
    run("doge_vs_dense", *sizes, "--mlp", 96, "--experts", 64, "--chosen", 4, "--look", 1, "--out", out)
    table = rows(out.with_suffix(".md"))
    assert set(table) == {"dense", "Doge, all keys", "Doge", "Doge, experts", "dense, wide"}
    assert all(3 < row[2] < 7 for row in table.values())
    for one, other, column in (("dense, wide", "Doge, experts", 0), ("dense", "Doge", 0), ("Doge", "Doge, experts", 1)):
        assert table[one][column] == pytest.approx(table[other][column], rel=0.02)
    assert out.with_suffix(".png").stat().st_size > 0


def test_kept_keys_reads_a_folder_that_was_trained(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{i} is followed by {i + 1}.\n" for i in range(500)))
    sizes = ("--steps", "1", "--batch-size", "2", "--sequence-length", "32", "--recipe", "tiny")
    train = [sys.executable, "-m", "thrifty", "train", words, "--model", "doge", "--output", tmp_path / "doge", *sizes]
    subprocess.run(train, check=True, capture_output=True)
    out = tmp_path / "kept"
    run("kept_keys", "--model", tmp_path / "doge", "--window", 5, "--text", words.read_text()[:150], "--out", out)
    text = out.with_suffix(".md").read_text()
    assert "layer 1, head 0" in text
    assert out.with_suffix(".png").stat().st_size > 0


def test_the_walkthrough_runs_to_its_end(tmp_path):
    printed = run("doge_walkthrough", "--short", "--out", tmp_path)
    assert "| tuned |" in printed
    assert float(printed.split("differs by ")[1].split()[0]) < 1e-4


def test_bert_learns_as_a_ternary_model_and_is_packed_without_a_change(tmp_path):
    sizes = ("--hidden", 32, "--layers", 1, "--vocab", 300, "--length", 16, "--labels", 2)
    printed = run("bert_ternary", "--steps", 30, *sizes, "--dense", "--out", tmp_path / "bert")
    assert "bert.encoder.layer.0.attention.self.query" in printed
    assert "the same bits as of the latent one" in printed
    lines = (tmp_path / "bert.md").read_text().splitlines()[2:6]
    table = {
        name: [float(cell.strip("%")) for cell in cells[:2]]
        for name, *cells in (row.strip("| ").split(" | ") for row in lines)
    }
    assert set(table) == {"dense", "ternary, untrained", "ternary, latent weights", "ternary, packed"}
    assert table["ternary, packed"][0] == table["ternary, latent weights"][0] > 40
    assert table["ternary, packed"][1] < table["dense"][1]
