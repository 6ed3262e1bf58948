"""Texts to train on: Python's own documentation and sources, a file, a folder, or a data set of Hugging Face.

A corpus is read once, whole, in a fixed order; its last bytes are held out and never trained on.
"""

import hashlib
import platform
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from thrifty.errors import ThriftyError
from thrifty.train.prose import prose

#: Bytes held out of the built-in corpus: the last of the joined topics of Python's help system.
BUILTIN_HELDOUT_BYTES = 60_000
#: Most bytes held out of a user's corpus, so that evaluating stays a matter of seconds.
HELDOUT_LIMIT = 1 << 20
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

    @property
    def text(self) -> str:
        """The training text of all parts, joined."""
        return "".join(document for part in self.parts for document in part.documents)

    def record(self) -> dict[str, object]:
        """What identifies the text: sizes and SHA-256 of both sides, and the Python it came from."""
        train, heldout = self.text.encode(), self.heldout.encode()
        return {
            "name": self.name,
            "python": platform.python_version(),
            "train_bytes": len(train),
            "train_sha256": hashlib.sha256(train).hexdigest(),
            "heldout_bytes": len(heldout),
            "heldout_sha256": hashlib.sha256(heldout).hexdigest(),
            "parts": {part.name: part.size for part in self.parts},
        }


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
        return _corpus(str(path), [path.read_text(encoding="utf-8")], heldout)
    except UnicodeDecodeError as problem:
        rule = f"[corpus] a text file must be UTF-8; {path} is not (byte {problem.start})"
        raise ThriftyError(f"{rule}; convert it, say with iconv") from problem


def dataset_corpus(name: str, config: str | None, column: str | None, heldout: float) -> Corpus:
    """The `train` split of a data set: a name on the Hugging Face hub, or a local folder that `datasets` can read.

    `column` holds the text; None takes `text`, or the only column of strings.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split="train")
    except (OSError, ValueError) as problem:
        raise ThriftyError(f"[corpus] {name} does not load as a data set: {problem}") from problem
    strings = [key for key, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    chosen = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if chosen is None or chosen not in strings:
        got = ", ".join(rows.column_names)
        raise ThriftyError(f"[corpus] {name} has no text column {chosen or 'text'!r}; got {got}; choose by --column")
    return _corpus(name, [f"{row}\n" for row in rows[chosen]], heldout)


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
