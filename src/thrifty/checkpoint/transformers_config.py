"""What plain transformers calls a decoder, where it has one that computes the same."""

from collections.abc import Mapping
from typing import Any

from thrifty.checkpoint.config import DecoderConfig
from thrifty.checkpoint.names import has_bias, linear_shapes

#: Model types of transformers, and the names of their classes for text.
CLASSES = {
    "bitnet": "BitNetForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "doge": "DogeForCausalLM",
}
#: Fields that say what a model is for, rather than what it computes.
_KEPT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range", "use_cache"),
    *("attention_dropout", "transformers_version", "is_bitnet_config", "pretraining_tp"),
)


def transformers_config(config: DecoderConfig, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json, without quantization_config, of transformers' model that computes the same; None where it has none.

    fields: the config.json that `config` was read from.
    """
    tied = {"tie_word_embeddings": config.tie_word_embeddings}
    if fields.get("model_type") in CLASSES and config.family != "1bitLLM":
        return {name: value for name, value in fields.items() if name != "quantization_config"} | tied
    usual = (config.mixers, config.feed_forward, config.residual) == (("attention",), "glu", "plain")
    if not usual or config.experts is not None or config.linear == "binary":
        return None
    model_type = attention_model_type(config)
    if model_type is None:
        return None
    return {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": fields.get("rope_parameters") or {"rope_type": "default", "rope_theta": config.rope_theta},
        **tied,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        **{name: fields[name] for name in _KEPT if name in fields},
    }


def biased(config: DecoderConfig) -> list[str]:
    """Low-bit linears of a layer that have a bias."""
    return [linear for linear in linear_shapes(config) if config.linear != "dense" and has_bias(config, linear)]


def attention_model_type(config: Any) -> str | None:
    """The model type of transformers that has attention, a gated feed-forward and these norms and biases, or None.

    config: a `DecoderConfig`, or `thrifty.models.ThriftyConfig`, whose fields have the same names.
    """
    whole = config.attention_out_bias or not config.attention_bias
    if config.norm_placement == "sub_ln":
        square = config.num_attention_heads * config.head_dim == config.hidden_size
        return "bitnet" if square and whole and not (config.attention_qk_norm or config.mlp_bias) else None
    kind = "qwen3" if config.attention_qk_norm else "llama" if whole else "qwen2"
    # Of the three only Llama has the feed-forward's biases.
    return kind if kind == "llama" or (not config.mlp_bias and whole == (kind == "qwen3")) else None
