"""Writing that leaves either the whole new file or the old one."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from thrifty.errors import ThriftyError

_WAYS_OUT = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EFBIG: "raise the limit on file sizes or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that can be written",
    errno.EPERM: "choose a place that can be written",
}


class UnwritableError(ThriftyError):
    """The system refused to write below `path`; `reason` is its own word for why."""

    def __init__(self, path: Path, number: int, kept: str = "") -> None:
        self.number, self.reason = number, os.strerror(number).lower()
        super().__init__(f"[save] {path} could not be written: {self.reason}; {_WAYS_OUT[number]}{kept}")


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Raises UnwritableError about `path` where the disk is full or the place cannot be written.

    Of nested blocks the outermost one counts: it names what the user asked for, not a folder on the way to it.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise UnwritableError(Path(path), number) from error


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file open for writing that takes the place of `path` when the block ends: write, fsync, rename.

    A block that raises leaves `path` as it was, and nothing beside it. Raises ThriftyError where `path` is a folder,
    the disk is full, or the place cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ThriftyError(f"[save] the output must be a file; {path} is a folder; choose another name")
    with _whole_or_not(path):
        _make_parent(path)
        temporary = _beside(path)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place when the block ends, its files fsynced.

    A block that raises leaves `path` as it was, and nothing beside it. Raises ThriftyError where `path` exists and
    `overwrite` is false or it holds more than a model, the disk is full, or the place cannot be written.
    """
    # A link stays, and what it leads to is replaced.
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    if path.exists() and not overwrite:
        raise ThriftyError(f"[save] the output folder must be new; {path} exists; choose another name or force it")
    if path.exists() and not path.is_dir():
        raise ThriftyError(f"[save] the output must be a folder; {path} is a file; choose another name")
    if path.exists() and not _is_model_or_empty(path):
        raise ThriftyError(
            f"[save] only a model's folder is replaced; {path} holds other things, which would be lost; choose another "
            "name"
        )
    with _whole_or_not(path):
        _make_parent(path)
        temporary = _beside(path)
        temporary.mkdir()
        try:
            yield temporary
            _fsync_files(temporary)
            _put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """An empty folder whose files move into `folder`, each whole, when the block ends; what else is there stays.

    The files get the permissions that the process gives to new ones. A block that raises leaves `folder` as it was.
    Raises ThriftyError where `folder` is a file, the disk is full, or the place cannot be written.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ThriftyError(f"[save] the output must be a folder; {folder} is a file; choose another name")
    new = not folder.exists()
    staging = folder / f".saving-{secrets.token_hex(4)}"
    with _whole_or_not(folder):
        try:
            staging.mkdir(parents=True)
            yield staging
            _fsync_files(staging)
            mode = staging.stat().st_mode & 0o666
            for file in sorted(
                staging.iterdir(), key=lambda file: file.suffix == ".json"
            ):  # a config after its tensors
                file.chmod(mode)  # safetensors writes for the owner alone
                os.replace(file, folder / file.name)
            _fsync_folder(folder)
        except BaseException:
            shutil.rmtree(folder if new else staging, ignore_errors=True)
            raise
        staging.rmdir()


@contextmanager
def _whole_or_not(path: Path) -> Iterator[None]:
    """`explained`, and what became of `path`."""
    kept = " (the one that was there is unchanged)" if path.exists() else " (nothing was left there)"
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise UnwritableError(path, number, kept) from error


def _number(error: Exception) -> int | None:
    """The system's number of an error that a user can put right, or None."""
    if isinstance(error, UnwritableError):
        return error.number
    if isinstance(error, OSError):
        return error.errno if error.errno in _WAYS_OUT else None
    # The Rust side of safetensors wraps the operating system's error in its own type.
    return next((n for n in _WAYS_OUT if f"os error {n})" in str(error)), None)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ThriftyError(
            f"[save] what {path} lies in must be folders; one of them is a file; choose another name"
        ) from error


def _beside(path: Path) -> Path:
    """A free name in the folder of `path`: a rename is atomic only within one file system."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _is_model_or_empty(folder: Path) -> bool:
    """Whether a folder is empty, or has the files of one model and no folders but that of its chat templates."""
    entries = list(folder.iterdir())
    flat = all(entry.is_file() or entry.name == "additional_chat_templates" for entry in entries)
    return not entries or (flat and (folder / "config.json").is_file())


def _put_in_place(new: Path, path: Path) -> None:
    """Rename folder `new` to `path`; a folder already there steps aside first, and back when that fails."""
    if not path.exists():
        os.rename(new, path)
        _fsync_folder(path.parent)
        return
    aside = _beside(path)
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise
    _fsync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _fsync_files(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _fsync_folder(Path(root))


def _fsync_folder(folder: Path) -> None:
    """Make the renames in `folder` last; Windows opens no folders and needs none of it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
