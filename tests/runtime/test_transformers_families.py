"""Ternary Llama, Qwen and BitNet folders against transformers, which loads the same folder."""

import contextlib
import importlib
import json
import warnings
from typing import Any

import numpy as np
import pytest

from thrifty.native import _library
from thrifty.runtime import load

torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 100.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 48}),
    "bitnet": ("BitNet", {}),
}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "divides": {"linear_class": "bitlinear"},
    "multiplies": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "latent": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "normed-divides": {"linear_class": "bitlinear", "use_rms_norm": True, "rms_norm_eps": 1e-4},
    "normed-latent": {"linear_class": "autobitlinear", "quantization_mode": "online", "use_rms_norm": True},
}
TOKENS = np.random.default_rng(0).integers(0, 300, 100).tolist()


@pytest.fixture(scope="module", autouse=True)
def eager_bitnet():
    """transformers' BitNet with its `torch.compile` decorators doing nothing."""
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.config.disable = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, on importing its compiler
        yield importlib.import_module("transformers.integrations.bitnet")
    dynamo.config.disable = False


def write_folder(folder, bitnet, family: str, convention: str, dtype=torch.float32) -> None:
    """A folder as transformers' own classes have it, with random codes, scales, biases and gains."""
    torch.manual_seed(0)
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | fields))
    quantization = transformers.BitNetQuantConfig(modules_to_not_convert=["lm_head"], **CONVENTIONS[convention])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    latent = {key: module.weight for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with torch.no_grad():
        # A residual stream that layers add to, and attention that is not the mean of all keys.
        model.get_input_embeddings().weight.normal_(0, 3)
        for key, weight in latent.items():
            weight *= 4 if key.endswith(("q_proj", "k_proj")) else 1
    model = bitnet.replace_with_bitnet_linear(model, ["lm_head"], quantization)
    tensors = {}
    for key, tensor in model.state_dict().items():
        linear, _, kind = key.rpartition(".")
        if "norm" in key:
            tensors[key] = torch.empty(tensor.shape).uniform_(0.5, 1.5).to(dtype)
        elif kind == "bias":
            tensors[key] = torch.empty(tensor.shape).uniform_(-0.5, 0.5).to(dtype)
        elif kind == "weight_scale":
            mean = latent[linear].abs().mean().reshape(1)
            tensors[key] = (1 / mean if quantization.linear_class == "bitlinear" else mean).to(dtype)
        elif f"{linear}.weight_scale" in model.state_dict():
            codes = torch.randint(-1, 2, latent[linear].shape, dtype=torch.int8)
            tensors[key] = bitnet.pack_weights(codes)
        elif not (linear == "lm_head" and config.tie_word_embeddings):
            tensors[key] = latent.get(linear, tensor).detach().to(dtype).contiguous()
    importlib.import_module("safetensors.torch").save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = {"architectures": [f"{name}ForCausalLM"], "dtype": "float32"}
    written |= {"quantization_config": quantization.to_dict()}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | written))


def check_parity(folder) -> None:
    """Logits of 100 positions within 1e-3 of their range, and the best token the same wherever it is clear.

    transformers adds RMSNorm's squares in another order, so that a code at a tie may differ by one, and other codes
    after it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].float().numpy()
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
def test_logits_are_those_of_transformers(eager_bitnet, family, convention, tmp_path):
    write_folder(tmp_path, eager_bitnet, family, convention)
    check_parity(tmp_path)


@pytest.mark.parametrize("convention", ["divides", "latent"])
def test_tensors_of_16_bits(eager_bitnet, convention, tmp_path):
    write_folder(tmp_path, eager_bitnet, "qwen2", convention, torch.bfloat16)
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
def test_numpy_computes_the_same(eager_bitnet, family, convention, tmp_path, monkeypatch):
    write_folder(tmp_path, eager_bitnet, family, convention)
    with without_library(monkeypatch):
        check_parity(tmp_path)


@pytest.mark.parametrize(("family", "convention"), [("qwen2", "divides"), ("qwen3", "normed-latent")])
def test_bits_depend_on_nothing_but_the_text(eager_bitnet, family, convention, tmp_path):
    write_folder(tmp_path, eager_bitnet, family, convention)
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
