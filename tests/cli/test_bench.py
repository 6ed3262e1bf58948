import pytest

from thrifty.cli import main
from thrifty.native import _library
from thrifty.runtime.measure import Size, last_level_cache, write_random


def test_kernels_and_decode_are_timed(tmp_path, capsys):
    folder = write_random(tmp_path / "model", Size(64, 32, 64, 1, 2, 1))
    assert main(["bench", str(folder), "--quick", "--tokens=5", "--threads=1", "--formats=i2"]) == 0
    text = capsys.readouterr().out
    assert "1024 × 1024" in text
    assert "whole decode" in text


@pytest.mark.parametrize("cache", [1 << 20, 1 << 30])
def test_80_columns_hold_the_tables_and_the_title_is_true(tmp_path, monkeypatch, capsys, cache):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("thrifty.runtime.measure.last_level_cache", lambda: cache)
    monkeypatch.setattr("thrifty.cli.bench.SHAPES", ((11008, 256),))
    folder = write_random(tmp_path / "model", Size(64, 32, 64, 1, 2, 1))
    assert main(["bench", str(folder), "--quick", "--tokens=5", "--threads=1", "--formats=base3"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    where = "memory" if cache < 1 << 24 else "the cache"
    assert f"matrices from {where}" in text
    assert f"read bandwidth of {where}" in text
    assert "keys and values in float32" in " ".join(text.split())


def test_numpy_reads_a_byte_a_weight_and_says_so(tmp_path, monkeypatch, capsys):
    folder = write_random(tmp_path / "model", Size(64, 32, 64, 1, 2, 1))
    monkeypatch.setattr(_library, "find", lambda: (None, "taken away for a test"))
    _library.load.cache_clear()
    try:
        monkeypatch.setattr("thrifty.cli.bench.SHAPES", ((64, 64),))
        monkeypatch.setattr("thrifty.cli.bench.MANY", 2)
        monkeypatch.setattr("thrifty.runtime.measure.matmul_seconds", lambda *_: 1e-6)
        assert main(["bench", str(folder), "--quick", "--tokens=5", "--formats=i2"]) == 0
    finally:
        monkeypatch.undo()
        _library.load.cache_clear()
    text = capsys.readouterr().out
    assert "through numpy, which holds a byte a weight" in text
    assert " 4.1 " in text  # 4096 bytes in a microsecond


def test_a_random_model_is_timed(monkeypatch, capsys):
    monkeypatch.setattr("thrifty.runtime.measure.SIZES", {"small": Size(64, 32, 64, 1, 2, 1)})
    assert main(["bench", "--quick", "--tokens=5", "--threads=1,2"]) == 0
    assert "random model of shape small" in capsys.readouterr().out


def test_the_cache_has_a_size():
    assert last_level_cache() >= 1 << 18


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--threads=x", "numbers apart by commas; got x"),
        ("--threads=0", "at least 1"),
        ("--random=huge", "must be one of demo, small, large; got huge"),
        ("--formats=i2,i3", "must be of i2, base3; got i3"),
    ],
)
def test_bad_options_are_one_sentence(option, sentence, capsys):
    assert main(["bench", option]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: [bench]")
    assert sentence in error
