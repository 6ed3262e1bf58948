"""The names of a decoder's tensors (transformers' own) and what each must look like."""

from dataclasses import dataclass
from typing import Literal

from thrifty.checkpoint.config import DecoderConfig
from thrifty.spec import ROW_BLOCK

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
#: The SSD's A in the seed's Cheems; here `A_log`, the logarithm of -A.
SEED_SSD_A = r"\.ssd\.A"
#: Names of the Wonderful Matrices seed (Doge, Cheems) as regular expressions, and what they are here, in this order.
SEED_NAMES = {
    r"word_embed\.": "embed_tokens.",
    r"final_layernorm\.": "norm.",
    r"\.pre_layernorm\.": ".input_layernorm.",
    r"\.pre_sequence_layernorm\.": ".input_layernorm.",
    r"\.post_layernorm\.": ".post_attention_layernorm.",
    r"\.pre_state_layernorm\.": ".post_attention_layernorm.",
    r"\.pre_residual\.weight": ".input_residual",
    r"\.post_sequence_residual\.weight": ".input_residual",
    r"\.input_residual\.weight": ".input_residual",
    r"\.post_residual\.weight": ".post_attention_residual",
    r"\.post_state_residual\.weight": ".post_attention_residual",
    r"\.post_attention_residual\.weight": ".post_attention_residual",
    r"\.feed_forward\.": ".mlp.",
    r"\.mlp\.queries_proj\.": ".mlp.queries.",
    r"\.attn\.": ".self_attn.",
    SEED_SSD_A: ".self_attn.A_log",
    r"\.ssd\.out_proj\.": ".self_attn.o_proj.",
    r"\.ssd\.": ".self_attn.",
    r"classifier\.": "score.",
}


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor must be."""

    shape: tuple[int, ...]
    #: "float": any float dtype; "codes": uint8, two bits a code (`spec.ROW_BLOCK`).
    kind: Literal["float", "codes"] = "float"
    #: False where a folder may leave it out.
    required: bool = True


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear of a layer, by its name in the layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (config.q_size, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, config.q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    if config.feed_forward == "mlp":
        del shapes["mlp.gate_proj"]
    return shapes


def norm_sizes(config: DecoderConfig) -> dict[str, int]:
    """Features of every norm of a layer, by its name in the layer."""
    sizes = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
    if config.norm_placement == "sub_ln":
        sizes |= {"self_attn.attn_sub_norm": config.q_size, "mlp.ffn_sub_norm": config.intermediate_size}
    return sizes


def has_bias(config: DecoderConfig, linear: str) -> bool:
    """Whether a linear of a layer has a bias."""
    return config.attention_bias and linear.startswith("self_attn.")


def expected_tensors(config: DecoderConfig) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint of `config`, by name."""
    tensors = {
        EMBEDDING: TensorInfo((config.vocab_size, config.hidden_size)),
        FINAL_NORM: TensorInfo((config.hidden_size,)),
    }
    if not config.tie_word_embeddings:
        tensors[HEAD] = TensorInfo((config.vocab_size, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm, size in norm_sizes(config).items():
            tensors[f"{prefix}{norm}.weight"] = TensorInfo((size,))
        for linear, shape in linear_shapes(config).items():
            tensors |= _linear_tensors(config, prefix + linear, shape)
            if has_bias(config, linear):
                tensors[f"{prefix}{linear}.bias"] = TensorInfo((shape[0],))
    return tensors


def _linear_tensors(config: DecoderConfig, name: str, shape: tuple[int, int]) -> dict[str, TensorInfo]:
    if config.linear == "dense":
        return {f"{name}.weight": TensorInfo(shape)}
    if config.storage == "latent":
        return {f"{name}.weight": TensorInfo(shape), f"{name}.weight_scale": TensorInfo((1,), required=False)}
    codes = TensorInfo(ROW_BLOCK.packed_shape(*shape), "codes")
    return {f"{name}.weight": codes, f"{name}.weight_scale": TensorInfo((1,))}
