"""Where documents come from: files, folders and data sets, read in a fixed order from any point on."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from thrifty.errors import ThriftyError

#: Endings of files whose rows are documents.
ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")
#: Bytes after which a text file is cut at the end of a line, so that no file has to fit into memory.
PIECE = 1 << 18
#: Rows of a Parquet file that are decoded at once.
_ROWS = 1024
#: A document, and the point to read on from after it.
Documents = Iterator[tuple[str, Any]]


class Source(Protocol):
    """Documents in a fixed order. A point is made of numbers, strings, lists and dicts; None is the beginning."""

    name: str

    def read(self, point: Any = None) -> Documents:
        """The documents from a point on, each with the point after it; null and empty rows are left out.

        Errors: a file that is damaged or has no text where it should.
        """
        ...

    def size(self) -> int | None:
        """Bytes that it takes on disk, where that is known."""
        ...


class Files:
    """A file, or all files below a folder (hidden ones and those without text left out), in the order of their names.

    Rows of JSON lines (plain or gzip) and Parquet are documents, by `column`: None takes `text`, or the only column of
    strings. Any other file is a document, in pieces of PIECE bytes.

    Errors: a path that does not exist, a folder without files.
    """

    def __init__(self, path: Path, column: str | None = None, name: str | None = None):
        self.name, self.path, self.column = name or path.resolve().name.partition(".")[0], path, column
        if path.is_dir():
            found = (f for f in path.rglob("*") if f.is_file())
            self.files = sorted(f for f in found if not any(p.startswith(".") for p in f.relative_to(path).parts))
        else:
            self.files = [path]
        if not path.exists() or not self.files:
            what = "has no file" if path.exists() else "does not exist"
            rule = f"[corpus] a text must be a file, or a folder with files; {path} {what}"
            raise ThriftyError(f"{rule}; check the path, or give a data set of Hugging Face by --dataset")

    def read(self, point: Any = None) -> Documents:
        first, inside = (0, None) if point is None else point
        for i, file in enumerate(self.files[first:], first):
            for text, after in self._reader(file)(file, inside if i == first else None):
                if text.strip():
                    yield whole_characters(text), [i, after]

    def size(self) -> int | None:
        return sum(file.stat().st_size for file in self.files)

    def _reader(self, file: Path) -> Callable[[Path, Any], Documents]:
        if file.name.endswith(".parquet"):
            return self._parquet
        if file.name.endswith(ROW_FILES):
            return self._lines
        return _pieces if self.path.is_dir() else _utf8_pieces

    def _lines(self, file: Path, point: Any) -> Documents:
        offset, number = (0, 0) if point is None else point
        with _whole(file), gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
            first = next((_row(file, n, line) for n, line in enumerate(lines, 1) if line.strip()), None)
            if first is None:
                return
            # A null may stand for a text.
            wanted = self.column or "text"
            strings = [key for key, v in first.items() if isinstance(v, str) or (v is None and key == wanted)]
            column = chosen_column(file, self.column, strings, list(first))
            lines.seek(offset)
            for line in lines:
                offset, number = offset + len(line), number + 1
                if line.strip():
                    row = _row(file, number, line)
                    if column not in row:
                        rule = f"[corpus] every row must have the column '{column}'; line {number} of {file} has"
                        raise ThriftyError(f"{rule} {', '.join(row) or 'none'}; choose another by --column")
                    yield _text(row[column], f"line {number} of {file}"), [offset, number]

    def _parquet(self, file: Path, point: Any) -> Documents:
        import pyarrow as arrow
        from pyarrow import parquet

        group, row = (0, 0) if point is None else point
        try:
            table = parquet.ParquetFile(file)
        except (OSError, arrow.ArrowException) as problem:
            raise _damaged(file, problem) from problem
        with table:
            schema = table.schema_arrow
            strings = [f.name for f in schema if arrow.types.is_string(f.type) or arrow.types.is_large_string(f.type)]
            column = chosen_column(file, self.column, strings, schema.names)
            for g in range(group, table.num_row_groups):
                done = 0
                try:
                    for batch in table.iter_batches(_ROWS, row_groups=[g], columns=[column]):
                        skipped = max(row - done, 0) if g == group else 0
                        for k, text in enumerate(batch.column(0).slice(skipped).to_pylist(), done + skipped + 1):
                            yield text or "", [g, k]
                        done += len(batch)
                except (OSError, arrow.ArrowException) as problem:
                    raise _damaged(file, problem) from problem


class DataSet:
    """A data set of Hugging Face: a name on its hub, or a folder that `datasets` wrote or reads.

    stream: read from the hub as it is needed, rather than downloaded first. column: as for `Files`.

    Errors: what does not load, a split or column that does not exist.
    """

    def __init__(
        self, name: str, config: str | None = None, column: str | None = None, *, split="train", stream=False
    ) -> None:
        import datasets
        from datasets.exceptions import DatasetsError

        self.name, self.where = Path(name).name, f"split '{split}' of {name}"
        try:
            if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
                kept: Any = datasets.load_from_disk(name)
                self.rows: Any = kept[split] if isinstance(kept, dict) else kept
            else:
                self.rows = datasets.load_dataset(name, config, split=split, streaming=stream)
        except (OSError, ValueError, KeyError, DatasetsError) as problem:
            reason = " ".join(str(problem).split())
            raise ThriftyError(f"[corpus] {name} does not load as a data set ({split}): {reason}") from problem
        self.streamed = isinstance(self.rows, datasets.IterableDataset)
        features = self.rows.features
        if features is None:
            features = self.rows._resolve_features().features
        strings = [key for key, kind in features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
        self.column = chosen_column(name, column, strings, list(features))
        self.rows = self.rows.select_columns([self.column])

    def read(self, point: Any = None) -> Documents:
        if self.streamed:
            rows = self.rows
            rows.load_state_dict(point)
            numbered = ((row, rows.state_dict) for row in rows)
        else:
            first = point or 0
            indices = range(first, len(self.rows))
            numbered = ((self.rows[i], lambda i=i: i + 1) for i in indices)
        for row, after in numbered:
            text = _text(row[self.column], self.where)
            if text.strip():
                yield whole_characters(text), after()

    def size(self) -> int | None:
        return None if self.streamed else self.rows.dataset_size or self.rows.data.nbytes


def chosen_column(where: object, given: str | None, strings: Sequence[str], columns: Sequence[str]) -> str:
    """The column of text: the given one, `text`, or the only one of strings. Raises ThriftyError without one."""
    chosen = given or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if chosen is None or chosen not in strings:
        got = ", ".join(columns) or "none"
        raise ThriftyError(f"[corpus] {where} has no text column {chosen or 'text'!r}; got {got}; choose by --column")
    return chosen


def whole_characters(text: str) -> str:
    """The text with its surrogates paired, and U+FFFD for those that are alone: what UTF-8 can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """What reading a file that is cut or damaged raises, as a ThriftyError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as problem:
        raise _damaged(file, problem) from problem


def _damaged(file: Path, problem: BaseException) -> ThriftyError:
    reason = " ".join(str(problem).split())
    return ThriftyError(f"[corpus] {file} cannot be read, as if it were cut off: {reason}; get it again")


def _row(file: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as problem:
        rule = f"[corpus] every line must be JSON; line {number} of {file} is not ({problem})"
        raise ThriftyError(f"{rule}; mend or delete it") from problem
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise ThriftyError(f"[corpus] every line must be a JSON object; line {number} of {file} is a {kind}")
    return row


def _text(value: Any, where: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    rule = f"[corpus] a column of text must hold strings; {where} holds a {type(value).__name__}"
    raise ThriftyError(f"{rule}; choose another by --column")


def _utf8_pieces(file: Path, point: Any) -> Documents:
    """`_pieces` of a file that must be UTF-8."""
    end = point or 0
    for text, end in _pieces(file, point):
        yield text, end
    if end < file.stat().st_size:
        rule = f"[corpus] a text file must be UTF-8; {file} is not (after byte {end})"
        raise ThriftyError(f"{rule}; convert it, say with iconv")


def _pieces(file: Path, point: Any) -> Documents:
    """A text file in pieces that end with a line, or, where a line is longer than a piece, with a character.

    It ends where the file is no UTF-8, or has a byte of zeros.
    """
    offset = point or 0
    with _whole(file), open(file, "rb") as content:
        content.seek(offset)
        while piece := content.read(PIECE):
            cut = piece.rfind(b"\n") + 1
            last = len(piece)
            ends = (last,) if last < PIECE else (cut,) if cut else range(last, last - 4, -1)
            text = next((text for end in ends if (text := _decoded(piece[:end])) is not None), None)
            if text is None or "\0" in text:
                return
            offset += len(text.encode())
            content.seek(offset)
            yield text, offset


def _decoded(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def has_rows(path: Path) -> bool:
    """Whether a file has rows, or a folder a file with rows."""
    names = [path.name] if path.is_file() else [name for _, _, files in os.walk(path) for name in files]
    return any(name.endswith(ROW_FILES) and not name.startswith(".") for name in names)
