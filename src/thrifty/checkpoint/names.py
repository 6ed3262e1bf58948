"""The names of a decoder's tensors (transformers' own) and what each must look like."""

from dataclasses import dataclass
from typing import Literal

from thrifty.checkpoint.config import DecoderConfig
from thrifty.spec import ROW_BLOCK

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
HEAD_NORM = "lm_head.rms_norm.weight"
GATE_BOUNDS = "model.lower_bounds"
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


def linear_shapes(config: DecoderConfig, layer: int = 0) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear of a layer that can be low-bit, by its name in the layer."""
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    mixers = {
        "attention": {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)},
        "mlgru": dict.fromkeys(("f_proj", "c_proj", "g_proj", "o_proj"), (hidden, hidden)),
        "ssd": {**dict.fromkeys(("x_proj", "b_proj", "c_proj"), (q, hidden)), "o_proj": (hidden, q)},
    }
    mixers["dynamic_mask"] = mixers["attention"]
    mixers["hgrn"] = dict.fromkeys(("i_proj", "f_proj", "g_proj", "o_proj"), (hidden, hidden))
    shapes = {f"self_attn.{name}": shape for name, shape in mixers[config.mixer(layer)].items()}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    if config.feed_forward == "mlp":
        del shapes["mlp.gate_proj"]
    return shapes


def all_linears(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """`linear_shapes` of all layers, by full names ("model.layers.0.self_attn.q_proj")."""
    return {
        f"model.layers.{layer}.{linear}": shape
        for layer in range(config.num_hidden_layers)
        for linear, shape in linear_shapes(config, layer).items()
    }


def linear_weights(config: DecoderConfig) -> int:
    """Weights of the linears of all layers."""
    return sum(rows * cols for rows, cols in all_linears(config).values())


def norm_sizes(config: DecoderConfig, layer: int = 0) -> dict[str, int]:
    """Features of every norm of a layer, by its name in the layer."""
    mixer = config.mixer(layer)
    sizes = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
    if config.norm_placement == "sub_ln":
        sizes["self_attn.attn_sub_norm"] = config.hidden_size if mixer == "mlgru" else config.q_size
        if config.experts is None:
            sizes["mlp.ffn_sub_norm"] = config.intermediate_size
    if (mixer == "dynamic_mask" and config.qk_norm) or (mixer == "attention" and config.attention_qk_norm):
        sizes |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    if mixer == "hgrn":
        sizes["self_attn.g_norm"] = config.hidden_size
    return sizes


def dense_shapes(config: DecoderConfig, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors that are neither norms nor low-bit linears, by their full names in the layer."""
    hidden, mixer, shapes = config.hidden_size, config.mixer(layer), {}
    if mixer in ("dynamic_mask", "ssd"):
        heads = config.score_heads if mixer == "dynamic_mask" else config.num_attention_heads
        read = config.kv_size if mixer == "dynamic_mask" else hidden
        shapes["self_attn.A" if mixer == "dynamic_mask" else "self_attn.A_log"] = (heads,)
        shapes["self_attn.dt_proj.weight"] = (heads, read)
        if config.attention_bias:
            shapes["self_attn.dt_proj.bias"] = (heads,)
    if config.residual == "scaled":
        shapes |= {"input_residual": (hidden,), "post_attention_residual": (hidden,)}
    experts = config.experts
    if experts is not None:
        if experts.router == "linear":
            shapes["mlp.router_gate.weight"] = (2 * experts.keys, hidden)
        else:
            shapes["mlp.queries.weight"] = (experts.heads * experts.retrieval, hidden)
            shapes["mlp.keys"] = (experts.heads, experts.keys, 2, experts.retrieval // 2)
        shapes |= dict.fromkeys(("mlp.down_embed.weight", "mlp.up_embed.weight"), (experts.count, hidden))
    return shapes


def has_bias(config: DecoderConfig, linear: str) -> bool:
    """Whether a linear of a layer has a bias."""
    if linear == "self_attn.o_proj" and not config.attention_out_bias:
        return False
    return config.attention_bias if linear.startswith("self_attn.") else config.mlp_bias


def expected_tensors(config: DecoderConfig) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint of `config`, by name."""
    tensors = {
        EMBEDDING: TensorInfo((config.vocab_size, config.hidden_size)),
        FINAL_NORM: TensorInfo((config.hidden_size,)),
    }
    if not config.tie_word_embeddings:
        tensors[HEAD] = TensorInfo((config.vocab_size, config.hidden_size))
    if config.ternary_head and config.linear_norm_eps is not None:
        tensors[HEAD_NORM] = TensorInfo((config.hidden_size,))
    if config.gate_bounds:
        tensors[GATE_BOUNDS] = TensorInfo((config.num_hidden_layers, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm, size in norm_sizes(config, layer).items():
            tensors[f"{prefix}{norm}.weight"] = TensorInfo((size,))
        for name, shape in dense_shapes(config, layer).items():
            tensors[prefix + name] = TensorInfo(shape)
        for linear, shape in linear_shapes(config, layer).items():
            tensors |= _linear_tensors(config, prefix + linear, shape)
            if config.linear_norm_eps is not None:
                tensors[f"{prefix}{linear}.rms_norm.weight"] = TensorInfo((shape[1],))
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
