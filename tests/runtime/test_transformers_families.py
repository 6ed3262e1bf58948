"""Ternary Llama, Qwen and BitNet folders against transformers, which loads the same folder."""

import contextlib

import numpy as np
import pytest

from thrifty.native import _library
from thrifty.runtime import load

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

from transformers_folders import CONVENTIONS, FAMILIES, TOKENS, check_parity, write_folder  # noqa: E402

pytestmark = pytest.mark.usefixtures("eager_bitnet")


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
