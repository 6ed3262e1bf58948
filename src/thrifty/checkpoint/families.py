"""The families of decoders: what a config.json of each leaves unsaid, and what its tensors are called here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """What config.json means for a model type."""

    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    norm_placement: Literal["pre", "sub_ln"] = "pre"
    residual: Literal["plain", "scaled"] = "plain"
    #: Whether config.json can choose mixers, feed-forward, linears and norms: the model types of this package.
    own: bool = False
    #: Biases of q, k and v; of o where those have one.
    attention_bias: bool = False
    attention_out_bias: bool = True
    #: Norms of queries and keys: of a dynamic mask, of attention.
    qk_norm: bool = False
    attention_qk_norm: bool = False
    #: The token mixer of every layer, where config.json cannot choose.
    mixer: str = "attention"
    #: Whether linears are ternary where no quantization_config says so; whether the output head is too.
    ternary: bool = False
    ternary_head: bool = False
    #: eps of a norm in front of every low-bit linear; None for what quantization_config says.
    linear_norm_eps: float | None = None
    #: Patterns of tensor names, and what takes their place.
    names: Mapping[str, str] = field(default_factory=dict)


#: Buffers that older versions of transformers saved; they follow from config.json.
IGNORED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_SUB_NORMS = {r"\.inner_attn_ln\.": ".attn_sub_norm.", r"\.ffn_layernorm\.": ".ffn_sub_norm."}
_MATMULFREE = {
    r"^model\.embeddings\.": "model.embed_tokens.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
    r"\.attn\.": ".self_attn.",
    r"(_proj|lm_head)\.norm\.": r"\1.rms_norm.",
}

FAMILIES = {
    "thrifty": Family(rms_norm_eps=1e-5, norm_placement="sub_ln", own=True),
    "cheems": Family(rms_norm_eps=1e-5, norm_placement="sub_ln", own=True),
    "matmulfree": Family(rms_norm_eps=1e-5, norm_placement="sub_ln", own=True),
    "doge": Family(mixer="dynamic_mask", residual="scaled", qk_norm=True),
    "bitnet": Family(500_000.0, 1e-5, "relu2", "sub_ln", names=_SUB_NORMS),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(attention_bias=True, attention_out_bias=False),
    "qwen3": Family(attention_qk_norm=True),
    # Saved as model type "llama", with `weight_bits`.
    "1bitLLM": Family(norm_placement="sub_ln", ternary=True, names=_SUB_NORMS),
    # The published MatMul-free LM. Its kernels leave the eps of its linears' norms, 1e-8, at their own default.
    "hgrn_bit": Family(mixer="hgrn", ternary=True, ternary_head=True, linear_norm_eps=1e-6, names=_MATMULFREE),
}


def family_of(fields: Mapping[str, Any]) -> str | None:
    """The key in `FAMILIES` of a config.json; None for a model type that is not among them."""
    model_type = fields.get("model_type")
    if model_type == "llama" and fields.get("weight_bits") is not None:
        return "1bitLLM"
    return model_type if isinstance(model_type, str) and model_type in FAMILIES else None


def our_name(family: str, name: str) -> str | None:
    """What a tensor of a family is called here; None for one that says nothing."""
    if IGNORED.search(name):
        return None
    for pattern, replacement in FAMILIES[family].names.items():
        name = re.sub(pattern, replacement, name)
    return name
