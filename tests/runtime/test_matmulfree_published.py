"""Folders of the published MatMul-free LM against its equations, written out here: none of its code runs on a CPU."""

import json
from typing import Any

import numpy as np
import pytest

from thrifty import ThriftyError, native
from thrifty.checkpoint import Tensor, open_folder, save_safetensors
from thrifty.convert import to_transformers
from thrifty.native import _library
from thrifty.runtime import load

D, INNER, LAYERS, VOCAB = 96, 256, 3, 200
CONFIG: dict[str, Any] = {"model_type": "hgrn_bit", "hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
CONFIG |= {"num_heads": 1, "hidden_act": "swish", "max_position_embeddings": 128, "rms_norm_eps": 1e-6}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 60).tolist()


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"lm_head": (VOCAB, D)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.attn.{x}_proj": (D, D) for x in "ifgo"}
        shapes[f"model.layers.{layer}.mlp.gate_proj"] = (2 * INNER, D)
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (D, INNER)
    arrays: dict[str, np.ndarray] = {"model.embeddings.weight": rng.normal(size=(VOCAB, D))}
    norms = ["model.norm", *(f"model.layers.{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "mlp_norm"))]
    norms += [f"model.layers.{i}.attn.g_norm" for i in range(LAYERS)]
    arrays |= {f"{norm}.weight": rng.uniform(0.5, 1.5, D) for norm in norms}
    arrays["model.lower_bounds"] = rng.normal(size=(LAYERS, D))
    for name, (rows, cols) in shapes.items():
        # A gate and an up of different sizes tell one scale of both from two.
        arrays[f"{name}.weight"] = rng.normal(size=(rows, cols)) * np.linspace(0.01, 0.03, rows)[:, None]
        arrays[f"{name}.norm.weight"] = rng.uniform(0.5, 1.5, cols)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def write(folder, arrays: dict[str, np.ndarray], **fields: Any):
    folder.mkdir(exist_ok=True)
    save_safetensors(folder / "model.safetensors", {name: Tensor.of(a) for name, a in arrays.items()}, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    return folder


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def expected(arrays: dict[str, np.ndarray], bounded: bool = True) -> np.ndarray:
    """Logits in float64."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(x: np.ndarray, name: str, eps: float = 1e-6) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        x, weight = norm(x, f"{name}.norm"), w[f"{name}.weight"]
        step = np.abs(x).max(-1, keepdims=True) / 127
        mean = np.abs(weight).mean()
        return (np.rint(x / step) * step) @ (np.clip(np.rint(weight / mean), -1, 1) * mean).T

    shares = np.exp(w["model.lower_bounds"]) / np.exp(w["model.lower_bounds"]).sum(0)
    x = w["model.embeddings.weight"][TOKENS]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        z = norm(x, f"{name}.attn_norm")
        f, bound = sigmoid(linear(z, f"{name}.attn.f_proj")), shares[1 : layer + 1].sum(0) if bounded else 0.0
        f = bound + (1 - bound) * f
        i, h, states = silu(linear(z, f"{name}.attn.i_proj")) * (1 - f), np.zeros(D), []
        for t in range(len(x)):
            h = f[t] * h + i[t]
            states.append(h)
        gated = norm(linear(z, f"{name}.attn.g_proj"), f"{name}.attn.g_norm") * silu(np.stack(states))
        x = x + linear(gated, f"{name}.attn.o_proj")
        gate, up = np.split(linear(norm(x, f"{name}.mlp_norm"), f"{name}.mlp.gate_proj"), 2, -1)
        x = x + linear(silu(gate) * up, f"{name}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


def check(folder, theirs: np.ndarray) -> None:
    """Codes at a tie may differ by one, and other codes after it."""
    apart = np.abs(load(folder).logits(TOKENS) - theirs).max(-1) / np.ptp(theirs)
    assert apart.max() < 1e-3
    assert apart.min() < 1e-6


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("library", [True, False])
def test_logits_are_those_of_the_equations(tmp_path, bounded, library, monkeypatch):
    arrays = weights()
    theirs = expected(arrays, bounded)
    if not bounded:
        del arrays["model.lower_bounds"]
    folder = write(tmp_path / "model", arrays, use_lower_bound=bounded)
    if library:
        check(folder, theirs)
        return
    monkeypatch.setattr(_library, "find", lambda: (None, "taken away for a test"))
    _library.load.cache_clear()
    try:
        check(folder, theirs)
    finally:
        monkeypatch.undo()
        _library.load.cache_clear()


@pytest.mark.skipif(not native.available(), reason="no native library")
def test_bits_depend_on_nothing_but_the_text(tmp_path):
    folder = write(tmp_path / "model", weights())
    whole = load(folder, n_threads=1).logits(TOKENS)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(load(folder, n_threads=threads).logits(TOKENS), whole)
    decoder = load(folder, n_threads=2)._decoder
    caches = [decoder.new_cache(128) for _ in range(3)]
    for length, cache in zip((40, 41, 57), caches, strict=True):
        decoder.advance(TOKENS[:length], cache)
    steps = decoder.advance_batch([TOKENS[at] for at in (40, 41, 57)], caches)
    np.testing.assert_array_equal(steps, whole[[40, 41, 57]])
    assert decoder.new_cache(128).nbytes == decoder.new_cache(64).nbytes


def test_gate_and_up_have_one_scale(tmp_path):
    arrays = weights()
    folder = open_folder(write(tmp_path / "model", arrays))
    codes, scale = zip(*(folder.codes(f"model.layers.0.mlp.{x}_proj", INNER) for x in ("gate", "up")), strict=True)
    whole = arrays["model.layers.0.mlp.gate_proj.weight"]
    assert scale[0] == scale[1] == pytest.approx(np.abs(whole).mean(), rel=1e-6)
    np.testing.assert_array_equal(np.concatenate(codes), np.clip(np.rint(whole / scale[0]), -1, 1))


@pytest.mark.parametrize("shape", [(), (2 * INNER,), (INNER, D), (2 * INNER, D + 1)])
def test_a_fused_projection_of_another_shape_is_refused(tmp_path, shape):
    arrays = weights() | {"model.layers.1.mlp.gate_proj.weight": np.zeros(shape, np.float32)}
    with pytest.raises(ThriftyError, match=r"layers.1.mlp.(gate|up)_proj"):
        open_folder(write(tmp_path / "model", arrays))


@pytest.mark.parametrize("to", ["autobitlinear", "bitlinear"])
def test_its_packed_copy_gives_the_same_logits(tmp_path, to):
    folder = write(tmp_path / "model", weights())
    to_transformers(open_folder(folder), tmp_path / "packed", to)
    np.testing.assert_array_equal(load(tmp_path / "packed").logits(TOKENS), load(folder).logits(TOKENS))


@pytest.mark.parametrize(
    ("fields", "named"), [({"use_short_conv": True}, "use_short_conv"), ({"expand_ratio": 2}, "expand_ratio")]
)
def test_what_is_not_run_is_refused(tmp_path, fields, named):
    with pytest.raises(ThriftyError, match=named):
        load(write(tmp_path / "model", weights(), **fields))
