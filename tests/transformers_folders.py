"""Folders as transformers' own classes have them: Llama, Qwen and BitNet, dense and in each form of quantisation."""

import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from thrifty.runtime import load

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


@contextmanager
def eager_bitnet() -> Iterator[None]:
    """transformers' BitNet with its `torch.compile` decorators doing nothing."""
    dynamo: Any = importlib.import_module("torch._dynamo")
    dynamo.config.disable = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, on importing its compiler
        importlib.import_module("transformers.integrations.bitnet")
    try:
        yield
    finally:
        dynamo.config.disable = False


def transformers_model(folder: Path) -> Any:
    """What transformers loads from a folder, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_folder(
    folder: Path, family: str, convention: str | None, dtype: torch.dtype = torch.float32, **sizes: int
) -> None:
    """A folder as transformers' own classes have it, with random codes, scales, biases and gains.

    convention: a key of `CONVENTIONS`; None for dense linears. sizes: go over those of config.json.
    """
    bitnet: Any = importlib.import_module("transformers.integrations.bitnet")
    torch.manual_seed(0)
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | fields | sizes))
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config)
    latent: dict[str, Any] = {
        key: module.weight for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    with torch.no_grad():
        # A residual stream that layers add to, and attention that is not the mean of all keys.
        model.get_input_embeddings().weight.normal_(0, 4)
        for key, weight in latent.items():
            weight *= 4 if key.endswith(("q_proj", "k_proj")) else 1
    written: dict[str, Any] = {"architectures": [f"{name}ForCausalLM"], "dtype": "float32"}
    divides = False
    if convention is not None:
        quantization = transformers.BitNetQuantConfig(modules_to_not_convert=["lm_head"], **CONVENTIONS[convention])
        divides, written["quantization_config"] = quantization.linear_class == "bitlinear", quantization.to_dict()
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
            tensors[key] = (1 / mean if divides else mean).to(dtype)
        elif f"{linear}.weight_scale" in model.state_dict():
            codes = torch.randint(-1, 2, latent[linear].shape, dtype=torch.int8)
            tensors[key] = bitnet.pack_weights(codes)
        elif not (linear == "lm_head" and config.tie_word_embeddings):
            tensors[key] = latent.get(linear, tensor).detach().to(dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict() | written))


def check_parity(folder: Path) -> None:
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
