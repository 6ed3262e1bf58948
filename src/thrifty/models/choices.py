"""What each field of a configuration can be, and the names that other generations have for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.checkpoint.config import config_of
from thrifty.errors import ThriftyError
from thrifty.nn.attention import check_heads
from thrifty.nn.dynamic_mask_attention import DT_HEADS, SELECTIONS, kept_keys
from thrifty.nn.experts import ROUTER_LAYOUTS, ROUTERS, check_experts
from thrifty.nn.linear import LINEARS
from thrifty.ops import ACTIVATIONS
from thrifty.spec import RopeScaling

if TYPE_CHECKING:
    from thrifty.models.configuration import ThriftyConfig

#: What each choice of a layer can be.
CHOICES = {
    "feed_forward": ("glu", "mlp", "cdmoe"),
    "linear": LINEARS,
    "norm_placement": ("sub_ln", "pre"),
    "hidden_act": tuple(ACTIVATIONS),
    "residual": ("plain", "scaled"),
    "dynamic_mask_selection": SELECTIONS,
    "dt_heads": DT_HEADS,
    "router": ROUTERS,
    "router_layout": ROUTER_LAYOUTS,
}
#: Mixers a pattern of layers can name.
TOKEN_MIXERS = ("attention", "dynamic_mask", "mlgru", "ssd")
#: Fields that transformers' BitNet does not have.
MIXTURE_FIELDS = {
    *("token_mixers", "feed_forward", "linear", "norm_placement", "residual", "hidden_dropout", "mlp_bias"),
    *("sliding_window", "dynamic_mask_selection", "keep_window_size", "dynamic_mask_ratio", "dt_heads", "qk_norm"),
    *("num_experts", "num_experts_per_tok", "num_experts_heads", "expert_retrieval_size", "router", "router_layout"),
    *("norm_topk_prob", "output_router_logits", "router_aux_loss_coef", "ssd_chunk_size", "ssd_rotary"),
    *("attention_out_bias", "attention_qk_norm", "linear_norm_eps"),
}
#: What config.json of other families leaves unsaid, or says by other names.
_CHOICES_READ = (
    *("norm_placement", "attention_bias", "attention_out_bias", "attention_qk_norm", "mlp_bias", "hidden_act"),
    *("rms_norm_eps", "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings"),
)
#: The seed's names of fields, and what they are called here.
SEED_FIELDS = {
    "hidden_bias": ("attention_bias", "mlp_bias"),
    "num_cdmoe_experts": ("num_experts",),
    "num_cdmoe_heads": ("num_experts_heads",),
    "num_cdmoe_experts_per_head": ("num_experts_per_tok",),
}
#: Sizes that must be whole and positive: of every model, of experts, of the seed's router.
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    "ssd_chunk_size",
)
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "num_experts_heads", "expert_retrieval_size")


def check_config(config: "ThriftyConfig") -> None:
    """Raises ThriftyError for a choice that does not exist and for sizes that do not fit."""
    name = type(config).__name__
    for field, choices in CHOICES.items():
        if getattr(config, field) not in choices:
            raise ThriftyError(f"[{name}] {field} must be one of {', '.join(choices)}; got '{getattr(config, field)}'")
    for field in _SIZES + (_EXPERT_SIZES if config.feed_forward == "cdmoe" else ()):
        _whole(name, field, getattr(config, field))
    _check_mixers(config, name)
    check_heads(config.hidden_size, config.num_attention_heads, config.num_key_value_heads or 0, config.head_dim)
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ThriftyError(f"[{name}] rope_type must be 'default' or 'llama3'; got '{kind}'")
    if "dynamic_mask" in config.mixers:
        kept_keys(
            config.dynamic_mask_selection,
            config.keep_window_size,
            config.dynamic_mask_ratio,
            config.max_position_embeddings,
            config.sliding_window,
        )
    elif config.sliding_window is not None:
        raise ThriftyError(
            f"[{name}] sliding_window must be None, as no mixer has one; got {config.sliding_window}; set it to None"
        )
    if config.feed_forward == "cdmoe":
        _check_experts(config, name)


def choices_of(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a folder of Llama, Mistral or Qwen, with the choices that their model type stands for.

    Raises ThriftyError for what the decoder has not.
    """
    config = config_of(path / "config.json", fields)
    return {
        **fields,
        "linear": fields.get("linear", config.linear),
        "token_mixers": ["attention"],
        "sliding_window": None,
        **{name: getattr(config, name) for name in _CHOICES_READ},
    }


def rope_scaling(config: "ThriftyConfig") -> RopeScaling | None:
    """How rotary frequencies are scaled."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") == "default":
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(*(rope[name] for name in names))


def pattern(layers: int, period: int | None, offset: int | None) -> list[str]:
    """The seed's pattern: a dynamic mask where layer % period = offset, SSD elsewhere."""
    period = 8 if period is None else period
    offset = period - 1 if offset is None else offset
    if period < 1 or not 0 <= offset < period:
        raise ThriftyError(
            f"[CheemsConfig] attn_layer_offset must be at least 0 and below attn_layer_period; got {offset} and "
            f"{period}; give token_mixers instead"
        )
    return ["dynamic_mask" if layer % period == offset else "ssd" for layer in range(layers)]


def _check_mixers(config: "ThriftyConfig", name: str) -> None:
    mixers = config.token_mixers or []
    unknown = [mixer for mixer in mixers if mixer not in TOKEN_MIXERS]
    if unknown or not mixers:
        raise ThriftyError(
            f"[{name}] token_mixers must be of {', '.join(TOKEN_MIXERS)}; got {unknown or 'an empty pattern'}"
        )
    if config.num_hidden_layers % len(mixers):
        raise ThriftyError(
            f"[{name}] the pattern token_mixers must repeat to {config.num_hidden_layers} layers; got {len(mixers)} "
            "entries; make it as long as the layers, or a part that divides them"
        )


def _check_experts(config: "ThriftyConfig", name: str) -> None:
    check_experts(name, "num_experts", config.num_experts, "num_experts_per_tok", config.num_experts_per_tok)
    if config.router == "linear" and config.num_experts_heads != 1:
        raise ThriftyError(
            f"[{name}] num_experts_heads must be 1 with router 'linear'; got {config.num_experts_heads}; for more "
            "take router='product_key_heads'"
        )
    if config.router == "product_key_heads" and config.expert_retrieval_size % 2:
        raise ThriftyError(
            f"[{name}] expert_retrieval_size must be even, a half for each key; got {config.expert_retrieval_size}"
        )
    if config.router == "product_key_heads" and config.router_layout == "legacy":
        raise ThriftyError(
            f"[{name}] router_layout 'legacy' is that of router 'linear'; got '{config.router}'; use 'per_token'"
        )


def _whole(name: str, field: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ThriftyError(f"[{name}] {field} must be a positive integer; got {value!r}")
