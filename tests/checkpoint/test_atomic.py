import errno
import os
import subprocess
import sys
import textwrap

import pytest

from thrifty import ThriftyError
from thrifty.checkpoint import atomic_file, atomic_files, atomic_folder


def test_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failing_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path, "w") as file:
        file.write(f"half {1 / 0}")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ThriftyError, match=r"a\.bin could not be written.*unchanged"), atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource limits")
def test_a_write_that_the_system_refuses(tmp_path):
    code = """
    import resource, signal, sys
    import numpy as np
    from thrifty import ThriftyError
    from thrifty.checkpoint import Tensor, atomic_folder, save_safetensors
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        with atomic_folder(sys.argv[1], overwrite=True) as folder:
            save_safetensors(folder / "model.safetensors", {"x": Tensor.of(np.zeros(100_000, np.float32))})
    except ThriftyError as error:
        print(error)
    """
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("[save]")
    assert "file too large" in done.stdout
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(folder) == ["config.json"]


def test_an_error_of_rust_about_the_disk_is_understood(tmp_path):
    with pytest.raises(ThriftyError, match=r"free some space"), atomic_folder(tmp_path / "model"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert os.listdir(tmp_path) == []


def test_folder_replaces_the_old_one_only_when_told(tmp_path):
    folder = tmp_path / "model"
    with atomic_folder(folder) as new:
        (new / "config.json").write_text("1")
    with pytest.raises(ThriftyError, match="exists"), atomic_folder(folder):
        pass
    with atomic_folder(folder, overwrite=True) as new:
        (new / "b").write_text("2")
    assert os.listdir(folder) == ["b"]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("content", ["notes.txt", "config.json/x", "inner/config.json"])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, content):
    file = tmp_path / "home" / content
    file.parent.mkdir(parents=True)
    file.write_text("kept")
    refused = pytest.raises(ThriftyError, match="only a model's folder is replaced")
    with refused, atomic_folder(tmp_path / "home", overwrite=True):
        pass
    assert file.read_text() == "kept"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    with atomic_folder(tmp_path / "link", overwrite=True) as new:
        (new / "b").write_text("2")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "model"]
    assert os.listdir(tmp_path / "model") == ["b"]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    rename = os.rename

    def second_fails(source, target):
        if str(target) == str(folder) and not (os.path.isdir(source) and os.listdir(source) == ["config.json"]):
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ThriftyError), atomic_folder(folder, overwrite=True) as new:
        (new / "new").write_text("new")
    assert os.listdir(folder) == ["config.json"]
    assert os.listdir(tmp_path) == ["model"]


def test_folder_over_a_file_is_refused(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ThriftyError, match="is a file"), atomic_folder(tmp_path / "model", overwrite=True):
        pass


def test_a_file_comes_with_the_folders_it_lies_in(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
@pytest.mark.parametrize("place", ["a", "a/b/c"])
def test_a_place_within_a_file_is_one_sentence(tmp_path, write, place):
    (tmp_path / "a").write_text("a file")
    path = tmp_path / place / "output"
    with pytest.raises(ThriftyError, match=r"^\[save\] what .*output lies in must be folders"), write(path):
        pass
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_over_a_folder_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ThriftyError, match=r"must be a file; .*/a is a folder"), atomic_file(tmp_path / "a"):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["a"]


def test_of_nested_writes_the_outermost_is_named(tmp_path):
    with (
        pytest.raises(ThriftyError, match=r"/model could not be written: no space.*\(nothing was left there\)"),
        atomic_folder(tmp_path / "model") as folder,
        atomic_files(folder),
        atomic_file(folder / "a.json"),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert os.listdir(tmp_path) == []


def test_files_join_a_folder_only_together(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), atomic_files(folder) as new:
        (new / "a").write_text(f"{1 / 0}")
    assert os.listdir(tmp_path) == []
    folder.mkdir()
    (folder / "old").write_text("old")
    with atomic_files(folder) as new:
        (new / "a").write_text("a")
        assert sorted(os.listdir(folder)) == sorted(["old", new.name])
    assert sorted(os.listdir(folder)) == ["a", "old"]
