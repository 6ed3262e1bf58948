import json

import numpy as np
import pytest

from thrifty import native
from thrifty.cli import main
from thrifty.native import _library
from thrifty.runtime import load, measure
from thrifty.runtime.measure import Size, Timer, last_level_cache, write_random

TINY = Size(64, 32, 64, 1, 2, 1)


@pytest.fixture
def small_buffer(monkeypatch):
    """Reading a megabyte instead of four times the cache."""
    monkeypatch.setattr(measure, "read_buffer", lambda: native.aligned_empty(1 << 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("models") / "tiny", TINY, max_position_embeddings=96)


@pytest.mark.usefixtures("small_buffer")
def test_tables_and_picture_hold_every_measurement(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "speeds.png"
    options = ["--threads=2,1", "--context=20,96", "--prompt=70", "--batch=1,3", "--rounds=1", "--cache-bits=8"]
    assert main(["bench", str(folder), *options, f"--plot={picture}"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    decoded = [row[:3] for row in rows if len(row) >= 3 and row[1:3] != ["70", "70"] and row[0] in ("1", "2")]
    for threads in "12":
        assert [threads, "1", "20"] in decoded
        assert [threads, "3", "96"] in decoded
        assert any(row[:2] == [threads, "70"] for row in rows)
    assert "head 8 bits, cache 8 bits" in " ".join(text.split())
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_buffer")
def test_json_is_for_machines(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--threads=1", "--context=32", "--prompt=8", "--rounds=3", "--weight-format=i2", "--head-bits=16"]
    assert main(["bench", str(folder), *options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    record = results["threads"][0]
    runtime = load(folder, weight_format="i2", cache_bits=8, max_context=32)
    assert record["weight_bytes"] == runtime.bytes_per_token
    assert record["operations_per_token"] == 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 64 * 32)
    decode, prefill = record["decode"][0], record["prefill"][0]
    # 16 steps end at 32 positions: 24.5 of them are read on average, of keys and values of 16 bytes and a scale.
    assert decode["bytes_per_token"]["median"] == runtime.bytes_per_token + 24.5 * 2 * (16 + 4)
    assert decode["tokens_per_second"]["low"] <= decode["tokens_per_second"]["median"]
    assert prefill["operations_per_second"]["median"] == pytest.approx(
        prefill["tokens_per_second"]["median"] * record["operations_per_token"]
    )
    assert decode["share"]["median"] > 0
    assert 0 < record["memory"]["anonymous"] <= record["memory"]["peak"]
    assert record["load_seconds"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_buffer")
def test_what_is_not_asked_for_fits_the_model(monkeypatch, capsys):
    monkeypatch.setattr(measure, "SIZES", {"small": TINY})
    assert main(["bench", "--rounds=1", "--threads=1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["threads"][0]
    assert [row["size"] for row in record["decode"]] == [64, 1024, 4096]
    assert [row["size"] for row in record["prefill"]] == [128, 512]


@pytest.mark.parametrize("native_library", [True, False])
@pytest.mark.parametrize("cache_bits", [32, 8])
def test_a_context_that_was_not_read_is_finite_and_kept(folder, monkeypatch, native_library, cache_bits):
    if not native_library:
        monkeypatch.setattr(_library, "find", lambda: (None, "taken away for a test"))
        _library.load.cache_clear()
    try:
        runtime = load(folder, cache_bits=cache_bits, n_threads=1)
        timer = Timer(runtime)
        times, nbytes = timer.decode(90, batch=2, seconds=0)
        assert len(times) == measure.STEPS
        assert nbytes == runtime.bytes_per_token + 2 * 82.5 * timer.cache_bytes
        assert timer.prefill(8) > 0
        caches = timer._caches
        assert [len(cache) for cache in caches] == [8, 90]
        # A token after the random positions has finite logits, which depend on them.
        logits = [runtime._decoder.advance([5], cache) for cache in caches]
        assert np.isfinite(logits).all()
        assert not np.array_equal(logits[0], logits[1])
    finally:
        if not native_library:
            monkeypatch.undo()
            _library.load.cache_clear()


@pytest.mark.skipif(not native.available(), reason="numpy has no ops to time")
def test_a_step_is_its_ops_and_a_rest(folder):
    timer = Timer(load(folder, n_threads=1))
    assert 0 < timer.overhead(32) < 1
    # The clock is off again.
    times, _ = timer.decode(32, seconds=0)
    assert len(times) == measure.STEPS


def test_the_cache_has_a_size():
    assert last_level_cache() >= 1 << 18


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--threads=x"], "[bench] --threads takes numbers apart by commas; got x"),
        (["--threads=0"], "[bench] --threads takes numbers from 1; got 0"),
        (["--shape=huge"], "[bench] --shape must be one of demo, small, 2b; got huge"),
        (["--context=64,97"], "[bench] --context may be at most 96, the model's context; got 97"),
        (["--prompt=200"], "[bench] --prompt may be at most 96, the model's context; got 200"),
        (["--weight-format=i3"], "[load] weight_format must be one of auto, i2, base3; got 'i3'"),
        (["--head-bits=7"], "[load] head_bits must be 8, 4 or None; got 7"),
    ],
)
@pytest.mark.usefixtures("small_buffer")
def test_bad_options_are_one_sentence(folder, options, sentence, capsys):
    assert main(["bench", str(folder), *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"
