"""Random checkpoints of a few kilobytes, written as folders, for the tests of checkpoint, runtime and cli."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from thrifty.checkpoint import Tensor, save_safetensors
from thrifty.spec import ROW_BLOCK, absmean, binary_codes, pack, round_bf16, ternary_codes

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 700,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "eos_token_id": 256,
}
PACKED = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "scale_dtype": "bfloat16",
}


@dataclass
class TinyCheckpoint:
    """A folder and, independent of every reader, the arrays that were written to it."""

    path: Path
    config: dict[str, Any]
    #: Dense float32 arrays, by tensor name.
    floats: dict[str, np.ndarray]
    #: Codes and scale, by linear ("model.layers.0.self_attn.q_proj"); empty for dense linears.
    codes: dict[str, tuple[np.ndarray, np.float32]]


def shapes(config: dict[str, Any]) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Linears and norms of a layer, written out independent of `thrifty.checkpoint.names`."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    linears = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    linears = {f"self_attn.{name}_proj": shape for name, shape in linears.items()}
    linears |= {"mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    if config.get("feed_forward", "glu") == "glu":
        linears["mlp.gate_proj"] = (inner, hidden)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.get("norm_placement", "sub_ln") == "sub_ln" and config.get("model_type") != "llama":
        norms |= {"self_attn.attn_sub_norm": q, "mlp.ffn_sub_norm": inner}
    return linears, norms


def write_checkpoint(path: Path, seed: int = 0, latent: bool = False, tokenizer: bool = True, **fields: Any):
    """Write a random checkpoint: packed, or with latent weights. `fields` go over SIZES into config.json."""
    rng = np.random.default_rng(seed)
    own = fields.keys() & {"linear", "feed_forward", "norm_placement", "attention_bias"}
    config: dict[str, Any] = {"model_type": "thrifty" if own else "bitnet"}
    config |= {"quantization_config": PACKED | ({"quantization_mode": "online"} if latent else {})} | SIZES | fields
    linear = config.get("linear", "ternary")
    if linear == "dense":
        del config["quantization_config"]
    linears, norms = shapes(config)
    tiny = TinyCheckpoint(path, config, {}, {})
    tensors: dict[str, Tensor] = {}

    def put(name: str, values: np.ndarray) -> None:
        tensors[name] = Tensor.of(values, "BF16")
        tiny.floats[name] = round_bf16(values.astype(np.float32))

    put("model.embed_tokens.weight", rng.normal(size=(config["vocab_size"], config["hidden_size"])))
    put("model.norm.weight", rng.normal(1, 0.2, config["hidden_size"]))
    if not config["tie_word_embeddings"]:
        put("lm_head.weight", rng.normal(size=(config["vocab_size"], config["hidden_size"])))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, size in norms.items():
            put(f"{prefix}{name}.weight", rng.normal(1, 0.2, size))
        for name, shape in linears.items():
            weight = round_bf16(rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32))
            if config["attention_bias"] and name.startswith("self_attn"):
                put(f"{prefix}{name}.bias", rng.normal(0, 0.1, shape[0]))
            if linear == "dense":
                put(f"{prefix}{name}.weight", weight)
                continue
            scale = np.float32(absmean(weight, np, round_bf16))
            codes = ternary_codes(weight, scale, np) if linear == "ternary" else binary_codes(weight, np)
            tiny.codes[prefix + name] = codes.astype(np.int8), scale
            if latent:
                tensors[f"{prefix}{name}.weight"] = Tensor.of(weight, "BF16")
                continue
            tensors[f"{prefix}{name}.weight"] = Tensor.of(pack(ROW_BLOCK, codes.astype(np.int8)))
            divides = config["quantization_config"]["linear_class"] == "bitlinear"
            stored = np.full(1, 1 / scale if divides else scale, np.float32)
            tensors[f"{prefix}{name}.weight_scale"] = Tensor.of(stored, "F32" if divides else "BF16")
    path.mkdir(parents=True, exist_ok=True)
    save_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    if tokenizer:
        byte_tokenizer().save(str(path / "tokenizer.json"))
    return tiny


def byte_tokenizer() -> Tokenizer:
    """Tokens 0-255 are the bytes, in the order of their stand-in characters; 256 is <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer
