"""One page about a run, in one file that needs no network: `report.html`, made anew at every evaluation."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from thrifty.checkpoint import UnwritableError, atomic_file
from thrifty.errors import ThriftyError
from thrifty.train.charts import Series, heat_map, lines, number
from thrifty.train.checkpoints import flat, newest_checkpoint, read_record

REPORT = "report.html"
#: What a log entry holds.
Entry = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --card: #fff; --text: #1d1d1f; --soft: #6b6b70; --grid: #e4e4e7;
  --series-0: #2563c9; --series-1: #d1491b; --series-2: #0b8a6f; --series-3: #8f4bb8; }
@media (prefers-color-scheme: dark) { :root { --back: #141416; --card: #1d1d20; --text: #ececee; --soft: #a0a0a8;
  --grid: #35353a; --series-0: #7cabff; --series-1: #ff9166; --series-2: #4fd1b0; --series-3: #cf9cf0; } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1360px; padding: 24px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 16px; margin: 0 0 4px; } .soft, em, .none { color: var(--soft); }
em { font-style: normal; } main { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(560px,
  100%), 1fr)); } section { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; min-width: 0;
  padding: 14px 16px; } section.wide { grid-column: 1 / -1; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 12px 0 20px; } .facts b { display: block;
  font-size: 20px; } svg { display: block; height: auto; width: 100%; } svg text { fill: var(--soft); font: 11px
  system-ui, sans-serif; } .legend { display: flex; flex-wrap: wrap; font-size: 13px; gap: 2px 16px; margin: 0 0 6px; }
.legend i { border-radius: 2px; display: inline-block; height: 10px; margin-right: 5px; width: 10px; }
.legend i.ramp { height: 10px; margin: 0 4px; width: 110px; } table { border-collapse: collapse; font-size: 13px;
  width: 100%; } td, th { border-top: 1px solid var(--grid); padding: 4px 12px 4px 0; text-align: left;
  vertical-align: top; } th { font-weight: 600; } td.text { font-family: ui-monospace, monospace; white-space:
  pre-wrap; word-break: break-word; } td.text span { color: var(--soft); }
.scroll { max-height: 480px; overflow: auto; }
"""


class Report(TrainerCallback):
    """Writes the page at the start and at every evaluation; stands behind the callbacks that add to the log.

    A page that cannot be written is told once, and stops nothing: it is made of the history, which checkpoints hold.
    """

    def __init__(self, output: Path, console: Console) -> None:
        self.output, self.console, self.told = output, console, False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.console.print(f"[bold]report[/]  {self.output / REPORT}, made anew at every evaluation")
            self.write(state.log_history)

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write(state.log_history)

    def write(self, history: Sequence[Entry]) -> None:
        """Write the page, or say once why not."""
        try:
            write_report(self.output, history)
        except UnwritableError as problem:
            if not self.told:
                self.console.print(f"[bold]report[/]  {self.output / REPORT} is not kept up to date: {problem.reason}")
            self.told = True


def write_report(output: Path, history: Sequence[Entry] | None = None) -> Path:
    """Write the page of the run in `output` from a log history, by default that of its newest checkpoint.

    Returns its path. Raises ThriftyError where there is no run, or the page cannot be written.
    """
    if history is None:
        history = read_history(output)
    with atomic_file(output / REPORT, "w") as file:
        file.write(page(output.resolve().name, read_record(output), history))
    return output / REPORT


def read_history(output: Path) -> list[Entry]:
    """The log history in the newest checkpoint of a run. Raises ThriftyError where there is none."""
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        rule = f"[report] a run must have a checkpoint, which holds its history; {output} has none"
        raise ThriftyError(f"{rule}; give the folder of a run of `thrifty train`")
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def page(name: str, record: Mapping[str, Any], history: Sequence[Entry]) -> str:
    """The HTML of a run called `name`, of what `training.json` says of it and of its log history."""
    settings = record.get("settings", {})
    models = {key: settings[key] for key in ("start", "teacher") if settings.get(key)}
    data = models | flat(settings.get("corpus", settings.get("data", {})))
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{escape(_recipe_line(settings))}</p>',
        _facts(record, history),
        "<main>",
        *_charts(history),
        _section("Samples over time", _samples(history), wide=True),
        _section("Settings", _table(flat(settings.get("recipe", {})))),
        _section("Data and versions", _table(data | flat(record.get("versions", {})))),
        "</main>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(name)}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>\n'
    )


def _recipe_line(settings: Mapping[str, Any]) -> str:
    recipe = settings.get("recipe", {})
    return f"recipe {recipe.get('name', 'unknown')}: {recipe.get('about', '')}".rstrip(": ")


def _facts(record: Mapping[str, Any], history: Sequence[Entry]) -> str:
    """The numbers that a reader wants first."""
    step, steps = max((int(entry["step"]) for entry in history), default=0), record.get("steps")
    seconds = max((float(entry.get("seconds", 0)) for entry in history), default=0.0)
    finished = bool(record.get("finished"))
    facts = [("finished" if finished else "running, at step", f"{step:,} of {steps:,}" if steps else f"{step:,}")]
    final, glances = record.get("bits_per_byte"), _series(history, "eval_bits_per_byte")[1]
    if final is not None:
        facts.append(("held-out bits per byte", f"{final:.4f}"))
    elif glances:
        facts.append(("held-out bits per byte, newest", f"{glances[-1]:.4f}"))
    losses, speeds = _series(history, "loss")[1], _series(history, "tokens_per_second")[1]
    if losses:
        facts.append(("training loss, nats per token", f"{losses[-1]:.4f}"))
    if speeds:
        facts.append(("tokens per second, median", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"))
    facts.append(("time", f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"))
    # Of a tuned model the record has several numbers by name.
    for what, key in (("parameters", "parameters"), ("held out", "heldout")):
        values = record.get(key) or {}
        named = {f"{what}, {k}": v for k, v in values.items()} if isinstance(values, dict) else {what: values}
        facts += [(k, f"{v / 1e6:.2f} M" if key == "parameters" else number(v)) for k, v in named.items()]
    cells = "".join(
        f'<div><b>{escape(value)}</b><span class="soft">{escape(label)}</span></div>' for label, value in facts
    )
    return f'<div class="facts">{cells}</div>'


def _charts(history: Sequence[Entry]) -> list[str]:
    scale, unit = _bits_per_byte(history)

    def one(label: str, key: str, factor: float = 1.0) -> Series:
        steps, values = _series(history, key)
        return label, steps, [value * factor for value in values]

    warmed_up = any(share != 1 for share in _series(history, "lambda")[1])
    shares = lines([one("λ", "lambda")], "share of quantisation") if warmed_up else ""
    rates = [one("matrices", "learning_rate"), one("others (Adam)", "adam_learning_rate")]
    zeros, flipped = (_layers(history, kind) for kind in ("zeros", "flipped"))
    found: list[tuple[str, str]] = [
        ("Loss", lines([one("training", "loss", scale), one("held out", "eval_loss", scale)], unit)),
        *_parts_of_the_loss(history),
        ("Learning rates", lines(rates, "largest step of an entry")),
        ("Gradient norm", lines([one("before clipping", "grad_norm")], "logarithmic", log=True)),
        ("Speed", lines([one("steps alone", "tokens_per_second")], "tokens per second")),
        ("Share of quantisation λ", shares or '<p class="none">1 throughout: quantised in full</p>'),
        ("Codes that are zero, by layer", heat_map(*zeros) if zeros else '<p class="none">none</p>'),
        (
            "Codes that changed since the look before, by layer (logarithmic)",
            heat_map(*flipped, log=True) if flipped else '<p class="none">none</p>',
        ),
    ]
    return [_section(title, chart) for title, chart in found]


def _parts_of_the_loss(history: Sequence[Entry]) -> list[tuple[str, str]]:
    """A chart of what a teacher adds to the loss, where there is one."""
    names = {"teacher_loss": "of the teacher's logits", "relation_loss": "of its attention relations"}
    parts = [(label, *_series(history, key)) for key, label in names.items()]
    return [("Loss by the teacher", lines(parts, "nats, weighted"))] if any(steps for _, steps, _ in parts) else []


def _bits_per_byte(history: Sequence[Entry]) -> tuple[float, str]:
    """What losses are multiplied by, and their unit: bits per byte where the log has both."""
    both = [e for e in history if e.get("eval_bits_per_byte") and e.get("eval_loss")]
    if not both:
        return 1.0, "nats per token"
    # Of training text by the tokens per byte of the held-out text, which it differs from a little.
    return both[-1]["eval_bits_per_byte"] / both[-1]["eval_loss"], "bits per byte"


def _series(history: Sequence[Entry], key: str) -> tuple[list[int], list[float]]:
    points = [(int(entry["step"]), float(entry[key])) for entry in history if isinstance(entry.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def _layers(history: Sequence[Entry], kind: str) -> tuple[list[str], list[int], list[list[float]]] | None:
    """Names, steps and [names][steps] of "KIND/NAME" in the log; None where there is none."""
    looks = [entry for entry in history if any(key.startswith(f"{kind}/") for key in entry)]
    names = list(dict.fromkeys(key for entry in looks for key in entry if key.startswith(f"{kind}/")))
    if not looks:
        return None
    values = [[float(entry.get(name, math.nan)) for entry in looks] for name in names]
    return [name.removeprefix(f"{kind}/") for name in names], [int(entry["step"]) for entry in looks], values


def _samples(history: Sequence[Entry]) -> str:
    rows = []
    for entry in reversed(history):
        for i in range(sum(key.startswith("prompt/") for key in entry)):
            prompt = f"<span>{escape(entry[f'prompt/{i}'])}</span>"
            texts = [f'<td class="text">{prompt}{escape(entry[f"{kind}/{i}"])}</td>' for kind in ("greedy", "seeded")]
            rows.append(f"<tr><td>{int(entry['step'])}</td>{''.join(texts)}</tr>")
    if not rows:
        return '<p class="none">nothing yet</p>'
    head = "<tr><th>step</th><th>the likeliest tokens</th><th>drawn, by one seed</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _section(title: str, content: str, wide: bool = False) -> str:
    return f"<section{' class=wide' if wide else ''}><h2>{escape(title)}</h2>{content}</section>"


def _table(rows: Mapping[str, Any]) -> str:
    cells = (
        f"<tr><th>{escape(name)}</th><td>{escape(number(v) if isinstance(v, float) else str(v))}</td></tr>"
        for name, v in rows.items()
    )
    return f'<div class="scroll"><table>{"".join(cells)}</table></div>'
