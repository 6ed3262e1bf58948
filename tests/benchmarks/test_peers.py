"""The peers' side of benchmarks/runtime_vs_peers.py: what they are given is the model that thrifty runs."""

import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thrifty import native
from thrifty.checkpoint import open_folder
from thrifty.convert import to_gguf
from thrifty.runtime import load, measure
from thrifty.runtime.measure import SIZES, Size, write_random
from thrifty.runtime.worker import Worker
from thrifty.spec.windows import scoring_windows
from thrifty.train.corpus import builtin_corpus

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
#: What `make demo` trains.
DEMO = Path(os.environ.get("THRIFTY_DEMO_MODEL", ROOT / "runs" / "demo" / "packed"))
PYTHON = os.environ.get("THRIFTY_PEER_PYTHON", sys.executable)
TOKENS = np.random.default_rng(3).integers(0, 2048, 40).tolist()


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up.
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


def peer(name: str) -> Worker:
    return Worker(name, (PYTHON, str(BENCHMARKS / "_peers.py"), name), {"OMP_NUM_THREADS": "1"})


def correlation(a: Any, b: Any) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def test_latent_weights_give_the_codes_back(tmp_path):
    packed = write_random(tmp_path / "packed", Size(64, 256, 512, 1, 2, 1))
    module("_peers").write_bf16(str(packed), str(tmp_path / "latent"))
    for linear, rows in (("self_attn.k_proj", 128), ("mlp.down_proj", 256)):
        name = f"model.layers.0.{linear}"
        codes, scale = open_folder(packed).codes(name, rows)
        latent, latent_scale = open_folder(tmp_path / "latent").codes(name, rows)
        np.testing.assert_array_equal(latent, codes)
        assert latent_scale == pytest.approx(scale, rel=2e-2)


def test_without_peers_the_benchmark_measures_thrifty(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(measure, "read_buffer", lambda: native.aligned_empty(1 << 20))
    options = ["--shape=demo", "--threads=1", "--rounds=1", "--only", "--measure", "decode", "batch", "--json"]
    monkeypatch.setattr(sys, "argv", ["runtime_vs_peers.py", *options[:-1], f"--json={tmp_path / 'numbers.json'}"])
    assert module("runtime_vs_peers").main() == 0
    text = capsys.readouterr().out
    assert "% of the bandwidth" in text
    assert "decode of 8 sequences over decode of one" in text
    assert (tmp_path / "numbers.json").read_text().startswith("{")


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("architecture", ["bitnet", "llama"])
def test_llama_cpp_computes_what_thrifty_does(tmp_path, kind, architecture):
    own = {"model_type": "thrifty", "norm_placement": "pre", "tie_word_embeddings": False}
    fields: dict[str, Any] = own if architecture == "llama" else {}
    packed = write_random(tmp_path / "packed", SIZES["demo"], hidden_act="silu", **fields)
    to_gguf(open_folder(packed), tmp_path / "model.gguf", kind)
    with peer("llama") as llama:
        assert llama("load", path=str(tmp_path / "model.gguf"), context=128, threads=1)["load_seconds"] > 0
        assert correlation(llama("logits", tokens=TOKENS), load(packed).logits(TOKENS)[-1]) > 0.98
        assert len(llama("decode", context=64, seconds=0)["seconds"]) == measure.STEPS
        assert llama("prefill", prompt=100) > 0


@pytest.mark.peers
@pytest.mark.parametrize("head_type", ["Q8_0", "F16"])
@pytest.mark.parametrize("weight_type", ["TQ2_0", "TQ1_0"])
def test_llama_cpp_knows_the_held_out_text_as_well_from_a_gguf_file(tmp_path, weight_type, head_type):
    to_gguf(open_folder(DEMO), tmp_path / "demo.gguf", weight_type, head_type)
    runtime, window = load(DEMO), 256
    text = builtin_corpus().heldout
    text = text.encode()[: 50 << 10].decode(errors="ignore")
    begin = open_folder(DEMO).json("config.json")["bos_token_id"]
    with peer("llama") as llama:
        llama("load", path=str(tmp_path / "demo.gguf"), context=window, threads=1)
        tokens = llama("encode", text=text)
        assert tokens == runtime.encode(text)
        windows = list(scoring_windows(len(tokens) + 1, window, window // 2))
        theirs = math.exp(llama("score", tokens=[begin, *tokens], windows=windows) / len(tokens))
    ours = runtime.perplexity(text, window)
    print(
        f"{weight_type}, head {head_type}: perplexity {theirs:.4f} in llama.cpp, {ours:.4f} here, {theirs / ours:.5f}"
    )
    assert abs(theirs / ours - 1) < 0.01


@pytest.mark.peers
def test_litespark_computes_what_thrifty_does(tmp_path):
    packed = write_random(tmp_path / "packed", SIZES["demo"])
    with peer("litespark") as litespark:
        litespark("write_bf16", source=str(packed), folder=str(tmp_path / "latent"))
        litespark("load", path=str(tmp_path / "latent"), context=128, threads=1)
        assert correlation(litespark("logits", tokens=TOKENS), load(packed).logits(TOKENS)[-1]) > 0.98
        assert len(litespark("decode", context=64, seconds=0)["seconds"]) == measure.STEPS
        assert litespark("prefill", prompt=100) > 0
