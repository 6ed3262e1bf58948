import base64
import errno
import io
import json
import math
import os
from html.parser import HTMLParser

import pytest
from rich.console import Console

from thrifty.checkpoint import atomic
from thrifty.cli import main
from thrifty.errors import ThriftyError
from thrifty.train import charts
from thrifty.train.report import Report, page, write_report

RECORD = {
    "settings": {
        "recipe": {"name": "tiny", "about": "to see that <all> works", "training": {"learning_rate": 1.5e-3}},
        "corpus": {"name": "lines", "train_bytes": 1234},
    },
    "finished": False,
    "steps": 40,
    "versions": {"torch": "2.13.0"},
}
VOID = {"meta", "link", "br", "img", "input", "hr"}


def history(steps=40):
    """A log with looks at every tenth step, and evaluations and samples at every twentieth."""
    log = []
    for step in range(2, steps + 1, 2):
        entry = {
            "step": step,
            "loss": 4 - step / 20,
            "grad_norm": 10 / step,
            "learning_rate": 1e-3,
            "seconds": 3.0 * step,
        }
        entry |= {"adam_learning_rate": 4e-3, "tokens_per_second": 1000.0 + step, "lambda": step / steps}
        if step % 10 == 0:
            entry |= {f"zeros/layers.{n}.mlp.up_proj": 0.3 + n / 10 for n in range(3)}
            entry |= {f"flipped/layers.{n}.mlp.up_proj": 0.1**n / step for n in range(3)}
        if step % 20 == 0:
            entry |= {"prompt/0": "Once <b>", "greedy/0": f" upon {step}", "seeded/0": " & again"}
        log.append(entry)
        if step % 20 == 0:
            log.append({"step": step, "eval_loss": 3.0, "eval_bits_per_byte": 1.5})
    return log


class Tree(HTMLParser):
    """Tags, texts by the section they are in, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.title = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.title = data
        self.sections[self.title] = self.sections.get(self.title, "") + data + " "

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def tree():
    return Tree(page("notes", RECORD, history()))


def test_a_reader_finds_the_numbers(tree):
    facts = " ".join(tree.sections[""].split())
    assert "notes recipe tiny: to see that <all> works 40 of 40 running, at step 1.5000 held-out bits per byte" in facts
    assert "2.0000 training loss, nats per token 1,022 tokens per second, median 2.0 min time" in facts
    loss = tree.sections["Loss"]
    # Nats per token times 1.5 bits per byte over 3 nats per token.
    assert "training 1 " in " ".join(loss.split())
    assert "held out 1.5 " in " ".join(loss.split())
    assert "bits per byte" in loss
    assert "others (Adam) 0.004" in " ".join(tree.sections["Learning rates"].split())
    assert "before clipping 0.25" in " ".join(tree.sections["Gradient norm"].split())
    assert "λ 1 " in " ".join(tree.sections["Share of quantisation λ"].split())
    assert "1040" in tree.sections["Speed"]
    assert "layers.2.mlp.up_proj: 0.5 at the end" in tree.sections["Codes that are zero, by layer"]
    assert "training.learning_rate 0.0015" in " ".join(tree.sections["Settings"].split())
    assert "train_bytes 1234" in " ".join(tree.sections["Data and versions"].split())
    assert "torch 2.13.0" in " ".join(tree.sections["Data and versions"].split())
    samples = " ".join(tree.sections["Samples over time"].split())
    assert samples.index("40 Once <b> upon 40 Once <b> & again") < samples.index("20 Once <b> upon 20")


def test_nothing_comes_from_elsewhere(tree):
    assert not tree.of("script")
    assert not tree.of("link")
    for _, attributes in tree.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    text = page("notes", RECORD, history())
    assert "http" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_curves_go_where_the_values_go(tree):
    lines = [[tuple(map(float, p.split(","))) for p in str(a["points"]).split()] for a in tree.of("polyline")]
    training, heldout = lines[:2]
    assert len(training) == 20
    assert len(heldout) == 2
    xs, ys = zip(*training, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # the loss falls, and the picture's y grows downwards
    assert heldout[0][1] == heldout[1][1]
    # At step 20 the training loss is 3 nats, as the held-out loss: one place.
    at = next(point for point, step in zip(training, range(2, 41, 2), strict=True) if step == 20)
    assert at == heldout[0]
    for line in lines:
        assert all(charts.LEFT <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in line)


def test_a_heat_map_has_a_pixel_for_each_layer_and_look(tree):
    zeros, flipped = (base64.b64decode(str(a["href"]).partition("base64,")[2]) for a in tree.of("image"))
    for picture in (zeros, flipped):
        assert picture.startswith(b"\x89PNG")
        assert [int.from_bytes(picture[i : i + 4]) for i in (16, 20)] == [4, 3]
    image = pytest.importorskip("PIL.Image")
    pixels = image.open(io.BytesIO(zeros)).load()
    assert pixels[0, 0] == (*charts.RAMP[0], 255)
    assert pixels[3, 2] == (*charts.RAMP[-1], 255)
    assert pixels[0, 1] == pixels[3, 1]


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"step": 1, "loss": 2.0, "learning_rate": 0.0, "grad_norm": 0.0}],
        [{"step": 1, "loss": math.nan, "grad_norm": math.inf}, {"step": 2, "loss": 1.0}],
        [{"step": 7, "zeros/a": 0.5, "flipped/a": 0.0, "loss": 1.0}, {"step": 9, "zeros/b": 0.5, "loss": 1.0}],
        [{"step": s, "loss": 1e-12 * s, "grad_norm": 10.0 ** (s % 40)} for s in range(1, 3000)],
    ],
)
def test_any_log_makes_a_page(log):
    tree = Tree(page("a & b", {}, log))
    assert "a & b" in tree.sections[""]
    assert all("nan" not in str(value) for _, attributes in tree.tags for value in attributes.values())


def test_a_teacher_has_a_chart_and_is_named():
    record = {"settings": {"start": "runs/dense", "teacher": "runs/large"}}
    tree = Tree(page("x", record, [{"step": 1, "loss": 2.0, "teacher_loss": 0.5, "relation_loss": 0.25}]))
    assert "attention relations 0.25" in " ".join(tree.sections["Loss by the teacher"].split())
    assert "start runs/dense teacher runs/large" in " ".join(tree.sections["Data and versions"].split())


def test_a_tuned_model_has_a_page():
    record = {
        "parameters": {"all": 2_000_000, "trained": 50_000},
        "heldout": {"loss": 1.25},
        "settings": {"data": {"rows": 7}},
    }
    tree = Tree(page("x", record, [{"step": 1, "loss": 2.0}]))
    facts = " ".join(tree.sections[""].split())
    assert "rows 7" in " ".join(tree.sections["Data and versions"].split())
    assert "2.00 M parameters, all 0.05 M parameters, trained 1.25 held out, loss" in facts


def test_a_page_of_one_loss_says_its_unit():
    tree = Tree(page("x", {}, [{"step": 1, "loss": 2.0, "lambda": 1.0}, {"step": 2, "loss": 1.0, "lambda": 1.0}]))
    assert "nats per token" in tree.sections["Loss"]
    assert "1 throughout" in tree.sections["Share of quantisation λ"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.00123456, "0.001235"), (1e-7, "1.00e-07"), (12345.6, "12,346")]
)
def test_numbers_are_short(value, text):
    assert charts.number(value) == text


def folder_of_a_run(path, log):
    checkpoint = path / "checkpoints/checkpoint-40"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (path / "training.json").write_text(json.dumps(RECORD | {"finished": True, "bits_per_byte": 1.25}))
    return path


def test_the_page_can_be_made_from_the_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("thrifty.train.report.newest_checkpoint", lambda output: output / "checkpoints/checkpoint-40")
    run = folder_of_a_run(tmp_path / "notes", history())
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    tree = Tree((run / "report.html").read_text())
    facts = " ".join(tree.sections[""].split())
    assert "40 of 40 finished 1.2500 held-out bits per byte" in facts


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(ThriftyError, match=r"\[report\] a run must have a checkpoint"):
        write_report(tmp_path)


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path, capsys, monkeypatch):
    report = Report(tmp_path, Console(width=200))
    report.write(history())
    before = (tmp_path / "report.html").read_text()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        report.write([])
        report.write([])
    assert capsys.readouterr().out.count("report.html is not kept up to date: no space left on device") == 1
    assert (tmp_path / "report.html").read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    report.write([])
    assert (tmp_path / "report.html").read_text() != before
