"""Ternary Llama, Qwen and BitNet folders against transformers, which loads the same folder."""

import contextlib

import numpy as np
import pytest

from thrifty.native import _library
from thrifty.runtime import load

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

from transformers_folders import CONVENTIONS, FAMILIES, eager_bitnet, transformers_model, write_folder  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 300, 100).tolist()


@pytest.fixture(scope="module", autouse=True)
def eager():
    with eager_bitnet():
        yield


def check_parity(folder) -> None:
    """Logits of 100 positions within 1e-3 of their range, and the best token the same wherever it is clear.

    transformers adds RMSNorm's squares in another order, so that a code at a tie may differ by one, and other codes
    after it.
    """
    with torch.no_grad():
        theirs = transformers_model(folder)(torch.tensor([TOKENS])).logits[0].float().numpy()
    ours, span = load(folder).logits(TOKENS), np.ptp(theirs)
    apart = np.abs(ours - theirs).max(-1) / span
    assert apart.max() < 1e-3
    # Some position comes before the first code that moved.
    assert apart.min() < 1e-6
    best = np.sort(theirs, -1)
    clear = best[:, -1] - best[:, -2] > 1e-3 * span
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, convention, tmp_path):
    write_folder(tmp_path, family, convention)
    check_parity(tmp_path)


@pytest.mark.parametrize("convention", ["divides", "latent"])
def test_tensors_of_16_bits(convention, tmp_path):
    write_folder(tmp_path, "qwen2", convention, torch.bfloat16)
    check_parity(tmp_path)


@contextlib.contextmanager
def without_library(monkeypatch):
    monkeypatch.setattr(_library, "find", lambda: (None, "taken away for a test"))
    _library.load.cache_clear()
    try:
        yield
    finally:
        monkeypatch.undo()
        _library.load.cache_clear()


@pytest.mark.parametrize(
    ("family", "convention"), [("llama3-rope", "divides"), ("qwen2", "multiplies"), ("qwen3", "normed-latent")]
)
def test_numpy_computes_the_same(family, convention, tmp_path, monkeypatch):
    write_folder(tmp_path, family, convention)
    with without_library(monkeypatch):
        check_parity(tmp_path)


@pytest.mark.parametrize(("family", "convention"), [("qwen2", "divides"), ("qwen3", "normed-latent")])
def test_bits_depend_on_nothing_but_the_text(family, convention, tmp_path):
    write_folder(tmp_path, family, convention)
    expected = load(tmp_path, n_threads=1).logits(TOKENS)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(load(tmp_path, n_threads=threads).logits(TOKENS), expected)
    runtime = load(tmp_path, n_threads=2)
    decoder = runtime._decoder
    caches = [decoder.new_cache(128) for _ in range(3)]
    for length, cache in zip((40, 41, 57), caches, strict=True):
        decoder.advance(TOKENS[:length], cache)
    steps = decoder.advance_batch([TOKENS[40], TOKENS[41], TOKENS[57]], caches)
    np.testing.assert_array_equal(steps, expected[[40, 41, 57]])
