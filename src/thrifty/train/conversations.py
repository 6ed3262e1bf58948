"""What a model is tuned on: conversations, prompts with answers, and answers of which one is preferred."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from thrifty.checkpoint.chat_format import CHAT_TEMPLATE
from thrifty.errors import ThriftyError
from thrifty.train.tokenizer import SPECIALS

#: Columns that a method reads, any of the choices: those of TRL.
COLUMNS = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
#: Kinds of files, by their endings, and what `datasets` calls them.
FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
#: The label of a token that is not learned.
IGNORED = -100
#: A piece of a text, and whether it is learned.
Piece = tuple[str, bool]


def read_rows(sources: Sequence[str | Path], method: str) -> Dataset:
    """The rows of files (JSONL, JSON, Parquet), of folders of such files, or of sets on the hub, one after the other.

    Raises ThriftyError where a source cannot be read, has no row, or lacks the columns of the method.
    """
    parts = []
    for source in sources:
        kind = FILES.get(Path(source).suffix.lower())
        if kind is not None and not Path(source).is_file():
            raise ThriftyError(f"[train] the data must be there; {source} does not exist; check the path")
        try:
            rows = load_dataset(kind, data_files=str(source)) if kind else load_dataset(str(source))
        except Exception as problem:  # what reads a file decides what it raises
            reason = " ".join(str(problem).split())[:300]
            rule = f"[train] the data must be JSONL, Parquet or a set on the hub; {source} is not"
            raise ThriftyError(f"{rule} ({reason}); check the path, or convert it") from problem
        if "train" not in rows:
            raise ThriftyError(
                f"[train] a data set must have the split 'train'; {source} has {', '.join(map(str, rows))}"
            )
        parts.append(_with_columns(rows["train"], method, source))
    return concatenate_datasets(parts)


def _with_columns(rows: Dataset, method: str, source: str | Path) -> Dataset:
    choices = COLUMNS[method]
    columns = next((choice for choice in choices if {*choice} <= {*rows.column_names}), None)
    if columns is None:
        wanted = ", or ".join(" and ".join(choice) for choice in choices)
        got = ", ".join(rows.column_names) or "no column"
        raise ThriftyError(f"[train] data for {method} must have {wanted}; got {got} in {source}; rename its columns")
    if len(rows) == 0:
        raise ThriftyError(f"[train] the data must have a row; {source} is empty")
    return rows.select_columns(list(columns))


def split_rows(rows: Dataset, heldout: float) -> tuple[Dataset, Dataset | None]:
    """Rows to learn from, and the last ones, of that share, to judge by; None for none."""
    count = min(int(len(rows) * heldout), len(rows) - 1)
    return rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows))) if count else None


def record_of(sources: Sequence[str | Path], rows: Dataset) -> dict[str, Any]:
    """What identifies the data: names, number and SHA-256 of the rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return {"names": [str(source) for source in sources], "rows": len(rows), "sha256": digest.hexdigest()}


def give_template(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """See that conversations can be rendered: by the tokenizer's own chat template, or by that of models trained here.

    Raises ThriftyError where rows are conversations and there is neither.
    """
    first = rows[0]
    talks = any(isinstance(first[name], list) for name in first)
    if not talks or tokenizer.chat_template is not None:
        return
    if not {*SPECIALS} <= tokenizer.get_vocab().keys():
        raise ThriftyError(
            "[train] conversations need a chat template; the tokenizer has none; set chat_template in its "
            "tokenizer_config.json, or give prompts and completions as plain text"
        )
    tokenizer.chat_template = CHAT_TEMPLATE


def supervised(rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Dataset, int]:
    """Rows as `input_ids` and `labels`, at most `length` tokens each, and how many were cut to that.

    Learned are answers, with the token that ends them: the assistant's turns of a conversation, the completion of a
    prompt; of a plain text, all. Pieces become tokens one by one, as they do when a prompt is answered. Rows of which
    nothing learned is left are dropped. Raises ThriftyError where none are left.
    """
    ids, labels, cut = [], [], 0
    for row in rows:
        row_ids, row_labels = [], []
        for text, learned in _pieces(row, tokenizer):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            row_ids += tokens
            row_labels += tokens if learned else [IGNORED] * len(tokens)
        cut += len(row_ids) > length
        # The first token is predicted by none.
        if any(label != IGNORED for label in row_labels[1:length]):
            ids.append(row_ids[:length])
            labels.append(row_labels[:length])
    if not ids:
        rule = f"[train] a row must have an answer within {length} tokens; none of {len(rows)} has"
        raise ThriftyError(f"{rule}; raise sequence_length")
    return Dataset.from_dict({"input_ids": ids, "labels": labels}), cut


def _pieces(row: Any, tokenizer: PreTrainedTokenizerBase) -> Iterable[Piece]:
    end = str(tokenizer.eos_token or "")
    if "text" in row:
        return [(row["text"] + end, True)]
    if "messages" in row:
        return _turns(row["messages"], 0, tokenizer, end)
    if isinstance(row["prompt"], str):
        return [(row["prompt"], False), (row["completion"] + end, True)]
    return _turns(row["prompt"] + row["completion"], len(row["prompt"]), tokenizer, end)


def _turns(messages: list[dict], first: int, tokenizer: PreTrainedTokenizerBase, end: str) -> list[Piece]:
    """A conversation as pieces, learned the assistant's turns from `first` on, each up to its end token."""
    pieces, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first:
            continue
        asked, answered = _rendered(tokenizer, messages[:i], True), _rendered(tokenizer, messages[: i + 1], False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise ThriftyError(
                "[train] a chat template must render a conversation turn by turn; that of the tokenizer changes what "
                "it wrote before an answer; give another one"
            )
        answer = answered[len(asked) :]
        if end and end in answer:
            answer = answer[: answer.rindex(end) + len(end)]
        pieces += [(asked[len(done) :], False), (answer, True)]
        done = asked + answer
    return pieces


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], ask: bool) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, KeyError, TypeError) as problem:
        rule = f"[train] the chat template must take the messages; {problem}; got roles"
        raise ThriftyError(f"{rule} {', '.join(str(message.get('role')) for message in messages)}") from problem
    return text


class PackedRows:
    """Collates rows, each of one or of several documents, into a batch that keeps documents apart.

    position_ids restart at 0 where a document begins, which is how transformers and the models here tell; padding, at
    the end of a row, is one more document. The first token of a document is not predicted.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad),
            "labels": torch.full((len(rows), width), IGNORED),
            "position_ids": torch.zeros((len(rows), width), dtype=torch.long),
        }
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            batch["input_ids"][i, :size] = torch.tensor(row["input_ids"])
            batch["labels"][i, :size] = torch.tensor(row["labels"])
            lengths = [*row["seq_lengths"], width - size]
            batch["position_ids"][i] = torch.cat([torch.arange(length) for length in lengths])
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch
