import pytest

from thrifty.cli import main
from thrifty.runtime.measure import Size, last_level_cache, write_random


def test_kernels_and_decode_are_timed(tmp_path, capsys):
    folder = write_random(tmp_path / "model", Size(64, 32, 64, 1, 2, 1))
    assert main(["bench", str(folder), "--quick", "--tokens=5", "--threads=1", "--formats=i2"]) == 0
    text = capsys.readouterr().out
    assert "1024 × 1024" in text
    assert "whole decode" in text


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
