"""Finding the newest whole checkpoint of a run, and refusing one that belongs to another run."""

import json
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thrifty.checkpoint import atomic_file, explained
from thrifty.errors import ThriftyError, ThriftyWarning

CHECKPOINTS = "checkpoints"
RECORD = "training.json"
#: Settings that say how a step is computed and not what, so that a run may go on with others: on fewer GPUs, say.
FREE = ("recipe.training.accumulate",)
#: The file of a checkpoint that is written last.
SEAL = "seal.json"


def seal(checkpoint: Path) -> None:
    """Write down the size and CRC-32 of every file of a checkpoint: it is whole, and damage can be told from now on."""
    marks = json.dumps(_marks(checkpoint), indent=1)
    with atomic_file(checkpoint / SEAL, "w") as file:
        file.write(marks + "\n")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: it was cut off before its seal, or a file is not what was sealed."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text())
    except (OSError, ValueError):
        return "it was cut off while it was saved"
    found = _marks(checkpoint)
    wrong = sorted(name for name, mark in sealed.items() if found.get(name) != mark)
    return f"{wrong[0]} is not what was saved" if wrong else None


def _marks(checkpoint: Path) -> dict[str, list[int]]:
    marks = {}
    for file in sorted(checkpoint.rglob("*")):
        if not file.is_file() or file.name == SEAL:
            continue
        crc = 0
        with open(file, "rb") as content:
            while piece := content.read(1 << 22):
                crc = zlib.crc32(piece, crc)
        marks[str(file.relative_to(checkpoint))] = [file.stat().st_size, crc]
    return marks


def newest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint below `output`, or None; one that is passed over is told by a ThriftyWarning."""
    folders = (output / CHECKPOINTS).glob("checkpoint-*")
    numbered = sorted((int(f.name.rpartition("-")[2]), f) for f in folders if f.name.rpartition("-")[2].isdigit())
    for _, folder in reversed(numbered):
        problem = damage(folder)
        if problem is None:
            return folder
        warnings.warn(f"[train] {folder} is passed over: {problem}", ThriftyWarning, stacklevel=2)
    return None


def checkpoint_to_resume(output: Path, settings: dict[str, Any], resume: bool | None) -> Path | None:
    """The checkpoint to go on from, or None to start at the beginning; nothing is changed.

    resume: True insists on a checkpoint, None goes on from one that is there, False wants to start anew. To go on, the
    settings must be those of the run.
    """
    record = output / RECORD
    checkpoint = None if resume is False else newest_checkpoint(output)
    if checkpoint is not None:
        _same_run(record, settings)
        return checkpoint
    if resume:
        way_out = "leave --resume out to start one"
        raise ThriftyError(f"[train] there must be a checkpoint to resume; {output / CHECKPOINTS} has none; {way_out}")
    if (output / "config.json").exists() and not record.exists() and resume is None:
        rule = f"[train] the output folder must be empty or hold a run of thrifty; {output} holds another model"
        raise ThriftyError(f"{rule}; choose another --output, or overwrite it by --fresh")
    return None


def clear_run(output: Path, fresh: bool) -> None:
    """Make the folder of a run that starts at the beginning, without what it holds of an earlier one.

    fresh: its checkpoints and logs go too.
    """
    if fresh:
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        shutil.rmtree(output / "logs", ignore_errors=True)
        (output / RECORD).unlink(missing_ok=True)
    with explained(output):
        output.mkdir(parents=True, exist_ok=True)
    # The tokenizer may be of another text.
    (output / "tokenizer.json").unlink(missing_ok=True)


def read_record(output: Path) -> dict[str, Any]:
    """What `training.json` says of a run; empty where there is none."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write `training.json`, whole or not at all."""
    with atomic_file(output / RECORD, "w") as file:
        file.write(json.dumps(record, indent=2) + "\n")


def _same_run(record: Path, settings: dict[str, Any]) -> None:
    way_out = "train anew by --fresh, or choose another --output"
    before = read_record(record.parent).get("settings")
    if not isinstance(before, dict):
        raise ThriftyError(f"[train] {record} must say what its checkpoints are, and does not; {way_out}")
    # JSON has no tuples: compare what a reader of the file would see.
    old, new = flat(before), flat(json.loads(json.dumps(settings)))
    changed = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in new | old
        if old.get(key) != new.get(key) and key not in FREE
    ]
    if changed:
        raise ThriftyError(f"[train] {record.parent} holds a run with other settings: {changed[0]}; {way_out}")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested settings, by names with points: `{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
