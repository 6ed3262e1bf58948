"""Texts to train on: Python's own documentation and sources, a file, a folder, or a data set of Hugging Face.

A corpus is read once, whole, in a fixed order; its last bytes are held out and never trained on.
"""

import hashlib
import math
import platform
import sysconfig
import tokenize
from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thrifty.errors import ThriftyError
from thrifty.train.prose import prose
from thrifty.train.sources import DataSet, Files, Source, has_rows

#: Bytes held out of the built-in corpus: the last of the joined topics of Python's help system.
BUILTIN_HELDOUT_BYTES = 60_000
#: Most bytes held out of a user's corpus, so that evaluating stays a matter of seconds.
HELDOUT_LIMIT = 1 << 20
#: Bytes of a stream that the tokenizer is trained on.
SAMPLE_BYTES = 4 << 20
#: Folders of the standard library's directory that are not its sources (`pydoc_data` holds the help topics themselves)
#: or are not written for readers (tests, tables of encodings).
NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "pydoc_data", "__pycache__", "test", "tests", "idle_test", "encodings"}
)


#: Shares of the parts over a run: (progress from 0 to 1, share of each part), joined by straight lines.
Mixture = tuple[tuple[float, dict[str, float]], ...]
#: Help topics are few and resemble what is held out: they are read about four times, the rest once or less.
BUILTIN_MIXTURE: Mixture = (
    (0.0, {"topics": 0.15, "prose": 0.6, "code": 0.25}),
    (1.0, {"topics": 0.25, "prose": 0.6, "code": 0.15}),
)


@dataclass(frozen=True)
class Part:
    """A named piece of the training text."""

    name: str
    documents: tuple[str, ...]
    #: How often it counts when the tokenizer's merges are chosen.
    vocabulary_weight: int = 1

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return sum(len(document.encode()) for document in self.documents)


@dataclass(frozen=True)
class Stream:
    """Sources that are read while training."""

    sources: tuple[Source, ...]
    #: Their shares of the blocks, in any unit.
    weights: tuple[float, ...]
    #: How many documents at the beginning of each are held out.
    heldout: tuple[int, ...]

    def record(self) -> dict[str, object]:
        """What identifies the text as far as can be told without reading it."""
        rows = zip(self.sources, self.weights, self.heldout, strict=True)
        return {s.name: {"bytes": s.size(), "weight": weight, "heldout_documents": n} for s, weight, n in rows}


@dataclass(frozen=True)
class Corpus:
    """Text to train on, and text held out to judge by."""

    #: What the text is, for a reader of the training record.
    name: str
    #: Training text; parts are kept apart so that a mixture can weigh them.
    parts: tuple[Part, ...]
    #: Held-out text.
    heldout: str
    #: How the parts are mixed over a run; empty: by their sizes.
    mixture: Mixture = ()
    #: What is read while training; parts are then a sample of it.
    stream: Stream | None = None

    @property
    def text(self) -> str:
        """The training text of all parts, joined."""
        return "".join(document for part in self.parts for document in part.documents)

    def record(self) -> dict[str, object]:
        """What identifies the text: sizes and SHA-256 of both sides, and the Python it came from."""
        train, heldout = self.text.encode(), self.heldout.encode()
        record: dict[str, object] = {
            "name": self.name,
            "python": platform.python_version(),
            "train_bytes": len(train),
            "train_sha256": hashlib.sha256(train).hexdigest(),
            "heldout_bytes": len(heldout),
            "heldout_sha256": hashlib.sha256(heldout).hexdigest(),
            "parts": {part.name: part.size for part in self.parts},
        }
        return record if self.stream is None else {**record, "stream": self.stream.record()}


def builtin_corpus() -> Corpus:
    """The corpus that every machine with Python has: help topics, and the standard library's prose and code.

    Held out are the last 60 000 bytes of the joined topics. A training line that occurs in them, whatever its
    indentation, is removed, so that nothing held out can be learned by heart; blank lines stay.
    """
    from pydoc_data.topics import topics

    train, heldout = split_tail("".join(topics.values()), BUILTIN_HELDOUT_BYTES)
    banned = {line.strip() for line in heldout.splitlines()}
    sources = [source for file in stdlib_files() if (source := _source(file))]
    words = [text for source in sources if (text := prose(source))]
    parts = (
        Part("topics", (without_lines(train, banned),), vocabulary_weight=4),
        Part("prose", tuple(without_lines(text, banned) for text in words)),
        Part("code", tuple(without_lines(text, banned) for text in sources), vocabulary_weight=0),
    )
    return Corpus("Python's help topics and standard library", parts, heldout, BUILTIN_MIXTURE)


def stdlib_files() -> list[Path]:
    """Sources of the standard library, in an order that does not depend on the file system."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in root.rglob("*.py") if not file.name.startswith("_sysconfigdata"))
    kept = [file for file in files if not NOT_STDLIB & set(file.relative_to(root).parts)]
    return sorted(kept, key=lambda file: file.relative_to(root).parts)


def text_corpus(path: Path, heldout: float) -> Corpus:
    """A text file, or every UTF-8 file below a folder (hidden ones left out), in the order of their names.

    `heldout` is the share of the bytes, at the end, that is held out.
    """
    if path.is_dir():
        return _corpus(str(path), _folder(path), heldout)
    if not path.exists():
        rule = f"[corpus] the text must be a file or a folder; {path} does not exist"
        raise ThriftyError(f"{rule}; check the path, or give a data set of Hugging Face by --dataset")
    try:
        # A character that the end of the file cuts, as those of enwik8 and of `head -c` do, is left out.
        return _corpus(str(path), [getincrementaldecoder("utf-8")().decode(path.read_bytes())], heldout)
    except UnicodeDecodeError as problem:
        rule = f"[corpus] a text file must be UTF-8; {path} is not (byte {problem.start})"
        raise ThriftyError(f"{rule}; convert it, say with iconv") from problem


def open_corpus(
    texts: Sequence[Path] = (),
    datasets: Sequence[str] = (),
    *,
    config: str | None = None,
    column: str | None = None,
    shares: Mapping[str, float] | None = None,
    heldout: str | float = 0.05,
    stream: bool = False,
) -> Corpus:
    """The text of files, folders and data sets of Hugging Face, mixed; with none of them the built-in corpus.

    One text file or folder of text is joined (`text_corpus`); elsewhere each row and file is a document
    (`thrifty.train.sources`). column: that of text. shares: weights by the names of sources, by default their sizes.
    heldout: a share of the text, at its end; or a file, or a split of the first data set. stream: documents are read as
    they are needed, and those held out are a source's first.

    Errors: sources that are empty or cannot be read, names and weights that do not fit.
    """
    share = heldout_share(heldout)
    if not texts and not datasets:
        if stream or shares:
            raise ThriftyError(
                "[corpus] a text must be given to be streamed or mixed; got none; name a file or --dataset"
            )
        return builtin_corpus()
    if len(texts) == 1 and not (datasets or shares or stream or share is None or has_rows(texts[0])):
        return text_corpus(texts[0], share)
    sources: list[Source] = [Files(path, column) for path in texts]
    sources += [DataSet(name, config, column, stream=stream) for name in datasets]
    names = [source.name for source in sources]
    for source, given in zip(sources, (*map(str, texts), *datasets), strict=True):
        source.name = given if names.count(source.name) > 1 else source.name
    weights = _weights(sources, shares)
    if share is not None:
        return _streamed(sources, weights, share) if stream else _read(sources, shares, share)
    other: Source
    if Path(str(heldout)).exists():
        other = Files(Path(str(heldout)), column)
    elif datasets:
        other = DataSet(datasets[0], config, column, split=str(heldout), stream=stream)
    else:
        rule = "[corpus] what is held out must be a share, a file, or a split of a data set"
        raise ThriftyError(f"{rule}; {heldout} does not exist; check the path")
    corpus = _streamed(sources, weights, 0.0) if stream else _read(sources, shares, 0.0)
    kept, _ = _first(other, HELDOUT_LIMIT)
    if not kept:
        raise ThriftyError(f"[corpus] a held-out text must hold text; {heldout} is empty; give another by --heldout")
    return replace(corpus, heldout=_joined(kept))


def heldout_share(heldout: str | float) -> float | None:
    """The share that is held out; None where a file or split is named."""
    try:
        share = float(heldout)
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise ThriftyError(f"[train] the held-out share must be at least 0 and below 1; got {heldout}")
    return share


def _weights(sources: Sequence[Source], shares: Mapping[str, float] | None) -> list[float]:
    """The weight of each source: given by its name, or its bytes."""
    names = [source.name for source in sources]
    for name, weight in (shares or {}).items():
        if name not in names:
            raise ThriftyError(f"[corpus] a mixture must name the sources; got {name}; they are {', '.join(names)}")
        if not 0 < weight < math.inf:
            rule = "[corpus] weights of a mixture must be more than 0"
            raise ThriftyError(f"{rule}; got {name}={weight}; leave out a source that is not wanted")
    if shares:
        absent = [name for name in names if name not in shares]
        if absent:
            rule = "[corpus] a mixture must give every source a weight"
            raise ThriftyError(f"{rule}; {absent[0]} has none; add {absent[0]}=WEIGHT")
        return [float(shares[name]) for name in names]
    if len(sources) == 1:
        return [1.0]
    sizes = [source.size() for source in sources]
    if None in sizes:
        rule = "[corpus] a mixture needs weights where a size is not known"
        raise ThriftyError(f"{rule}; {names[sizes.index(None)]} is streamed; give --mix NAME=WEIGHT for every source")
    return [float(size or 0) for size in sizes]


def _read(sources: Sequence[Source], shares: Mapping[str, float] | None, share: float) -> Corpus:
    """All documents of the sources, and their last ones held out."""
    parts, tails = [], []
    for source in sources:
        documents = [text for text, _ in source.read()]
        sizes = [len(text.encode()) for text in documents]
        missing = min(int(sum(sizes) * share), HELDOUT_LIMIT // len(sources))
        tail: list[str] = []
        while documents and sizes[-1] <= missing:
            missing -= sizes.pop()
            tail.insert(0, documents.pop())
        if documents and missing and not tail:
            # One document that is longer than what is held out.
            documents[-1], kept = split_tail(documents[-1], missing)
            tail = [kept]
        documents = [text for text in documents if text]
        if not documents:
            raise _empty(source)
        parts.append(Part(source.name, tuple(documents)))
        tails += tail
    mixture: Mixture = ((0.0, dict(shares)),) if shares else ()
    return Corpus(_names(sources), tuple(parts), _joined(tails), mixture)


def _streamed(sources: Sequence[Source], weights: Sequence[float], share: float) -> Corpus:
    """Documents to be read later: a sample of them, and the first held out."""
    parts, heads, skipped = [], [], []
    for source in sources:
        most, size = HELDOUT_LIMIT // len(sources), source.size()
        held = most if size is None else min(most, int(size * share))
        head, point = _first(source, held if share else 0)
        sample, _ = _first(source, SAMPLE_BYTES // len(sources), point)
        if not sample:
            raise _empty(source)
        heads += head
        skipped.append(len(head))
        parts.append(Part(source.name, tuple(sample)))
    stream = Stream(tuple(sources), tuple(weights), tuple(skipped))
    return Corpus(_names(sources), tuple(parts), _joined(heads), stream=stream)


def _first(source: Source, size: int, point: Any = None) -> tuple[list[str], Any]:
    """The first documents, of so many bytes together, or one more where it begins within, and the point after them."""
    documents, point_after = [], point
    for text, after in source.read(point) if size > 0 else ():
        documents.append(text)
        point_after, size = after, size - len(text.encode())
        if size <= 0:
            break
    return documents, point_after


def _joined(documents: Sequence[str]) -> str:
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in documents)


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(source.name for source in sources)


def _empty(source: Source) -> ThriftyError:
    rule = f"[corpus] a text must hold something beside what is held out; {source.name} is empty"
    return ThriftyError(f"{rule}; give a file, folder or data set with more text")


def split_tail(text: str, tail_bytes: int) -> tuple[str, str]:
    """Cut `text` before its last `tail_bytes` bytes of UTF-8, or up to three later where a character is in the way."""
    data = text.encode()
    cut = max(len(data) - tail_bytes, 0)
    while cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut += 1
    return data[:cut].decode(), data[cut:].decode()


def without_lines(text: str, banned: set[str]) -> str:
    """`text` without the lines that, stripped, are in `banned`; blank lines stay."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.strip() or line.strip() not in banned)


def _corpus(name: str, documents: Iterable[str], heldout: float) -> Corpus:
    text = "".join(documents)
    if not text.strip():
        raise ThriftyError(f"[corpus] the corpus must hold text; {name} is empty; give a file or folder with text")
    size = len(text.encode())
    train, tail = split_tail(text, min(int(size * heldout), HELDOUT_LIMIT))
    return Corpus(name, (Part("text", (train,)),), tail)


def _folder(path: Path) -> list[str]:
    documents = []
    for file in sorted(path.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        data = file.read_bytes()
        if b"\0" not in data:
            try:
                documents.append(data.decode("utf-8"))
            except UnicodeDecodeError:
                continue
    return documents


def _source(file: Path) -> str:
    try:
        with tokenize.open(file) as source:
            return source.read()
    except (SyntaxError, UnicodeDecodeError):
        # A few files of the standard library show bad encodings on purpose.
        return ""
