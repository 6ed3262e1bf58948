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


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file open for writing that takes the place of `path` when the block ends: write, fsync, rename.

    A block that raises leaves `path` as it was, and nothing beside it. Raises ThriftyError where the disk is full or
    the place cannot be written.
    """
    path = Path(path)
    with _explained(path):
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
    `overwrite` is false, the disk is full, or the place cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ThriftyError(f"[save] the output folder must be new; {path} exists; choose another name or force it")
    if path.exists() and not path.is_dir():
        raise ThriftyError(f"[save] the output must be a folder; {path} is a file; choose another name")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _WAYS_OUT:
            raise
        raise ThriftyError(_explanation(path, error.errno)) from error
    except ThriftyError:
        raise
    except Exception as error:
        # The Rust side of safetensors wraps the operating system's error in its own type.
        number = next((n for n in _WAYS_OUT if f"os error {n})" in str(error)), None)
        if number is None:
            raise
        raise ThriftyError(_explanation(path, number)) from error


def _explanation(path: Path, number: int) -> str:
    kept = "the one that was there is unchanged" if path.exists() else "nothing was left there"
    return f"[save] {path} could not be written: {os.strerror(number).lower()}; {_WAYS_OUT[number]} ({kept})"


def _beside(path: Path) -> Path:
    """A free name in the folder of `path`: a rename is atomic only within one file system."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


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
