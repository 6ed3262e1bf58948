"""Configurations of the decoder: the only home of its defaults."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from thrifty.checkpoint.transformers_config import attention_model_type
from thrifty.errors import ThriftyError
from thrifty.models.choices import MIXTURE_FIELDS, SEED_FIELDS, check_config, choices_of, pattern

logger = logging.get_logger(__name__)


class ThriftyConfig(PreTrainedConfig):
    """The decoder's shape and choices; fields that transformers' models have too bear their names and meaning.

    token_mixers: a pattern over layers, repeated to `num_hidden_layers`; each entry "attention", "dynamic_mask",
    "mlgru" or "ssd". feed_forward: "glu", "mlp" or "cdmoe" (a shared GLU beside routed experts), with `hidden_act`.
    linear: "ternary", "binary" or "dense" projections; embedding, head, routers and `dt_proj` are always dense.
    norm_placement: "sub_ln" (BitNet: also before `o_proj`, and `down_proj` but in cdmoe) or "pre". linear_norm_eps: eps
    of a norm with gain in front of every low-bit linear, None for no such norms (transformers' use_rms_norm). residual:
    "plain" or "scaled" (Doge: a learned factor per channel on the path around a block). rope_theta and rope_parameters
    are both read; rope types are "default" and "llama3". Of attention: attention_out_bias says whether `o_proj` has a
    bias where attention_bias gives q, k and v one (not in Qwen2); attention_qk_norm puts an RMSNorm on each head of q
    and k (as in Qwen3).

    Dynamic mask: dynamic_mask_selection "keep_window" keeps the `keep_window_size` best keys, "ratio" keeps
    int(dynamic_mask_ratio * max_position_embeddings), "none" keeps all; "ratio_legacy" is the seed's threshold over all
    keys, which sees the future. dt_heads: scores per "kv" head or per "attention" head. qk_norm: RMSNorm of queries
    and keys. Experts: num_experts (a square) of one unit, of which num_experts_per_tok answer per head of the router;
    router "linear" (transformers' Doge) or "product_key_heads" (the seed's: num_experts_heads of expert_retrieval_size
    features); router_layout "per_token", or "legacy", which mixes tokens as transformers' Doge does.
    SSD: ssd_chunk_size tokens at once; ssd_rotary turns B and C by their positions.

    Folders of Llama, Mistral, Qwen2 and Qwen3 are read too: dense, or ternary where they are quantised or where
    linear="ternary" is given. A folder is saved with model_type "bitnet", "llama", "qwen2", "qwen3" or "doge" where
    plain transformers computes the same from it, else with one of this package. Raises ThriftyError for a choice that
    does not exist and for sizes that do not fit.
    """

    model_type = "thrifty"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    default_theta = 10_000.0

    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = True
    attention_qk_norm: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    mlp_bias: bool = False
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    token_mixers: str | list[str] | None = "attention"
    feed_forward: str = "glu"
    linear: str = "ternary"
    norm_placement: str = "sub_ln"
    linear_norm_eps: float | None = None
    residual: str = "plain"
    dynamic_mask_selection: str = "keep_window"
    keep_window_size: int = 2048
    dynamic_mask_ratio: float = 0.0
    dt_heads: str = "kv"
    qk_norm: bool = False
    num_experts: int = 16_384
    num_experts_per_tok: int = 64
    num_experts_heads: int = 1
    expert_retrieval_size: int = 64
    router: str = "linear"
    router_layout: str = "per_token"
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    ssd_chunk_size: int = 256
    ssd_rotary: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = self._read_seed_fields(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if isinstance(self.token_mixers, str):
            self.token_mixers = [self.token_mixers]
        super().__post_init__(**kwargs)
        check_config(self)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    def mixer(self, layer: int) -> str:
        """The token mixer of a layer."""
        mixers = self.token_mixers or ["attention"]
        return mixers[layer % len(mixers)]

    @property
    def mixers(self) -> set[str]:
        """The token mixers that some layer has."""
        return {self.mixer(layer) for layer in range(self.num_hidden_layers)}

    @property
    def is_stateful(self) -> bool:
        """Whether some layer's cache cannot give tokens back: anything but attention over all keys."""
        return self.mixers != {"attention"}

    @property
    def has_positions(self) -> bool:
        """Whether some layer reads rotary positions; the others know where they are, however long the text."""
        return any(self.reads_positions(mixer) for mixer in self.mixers)

    def reads_positions(self, mixer: str) -> bool:
        """Whether a mixer of that name is given rotary positions."""
        return mixer in ("attention", "dynamic_mask") or (mixer == "ssd" and self.ssd_rotary)

    @property
    def plain_type(self) -> str | None:
        """The model type of transformers that computes the same from the folder (packed, where linears are ternary)."""
        if self.is_plain_doge:
            return "doge"
        head_dim = self.head_dim or 0
        q, kv = self.num_attention_heads * head_dim, (self.num_key_value_heads or 0) * head_dim
        biased = self.attention_bias or self.mlp_bias
        # Of packed layers, transformers' have four rows to a byte and no padding, and scale a bias with the product.
        packs = not biased and all(width % 4 == 0 for width in (self.hidden_size, self.intermediate_size, q, kv))
        usual = self.mixers == {"attention"} and self.feed_forward == "glu"
        plain = usual and (self.residual, self.hidden_dropout) == ("plain", 0)
        if not plain or not (self.linear == "dense" or (self.linear == "ternary" and packs)):
            return None
        kind = attention_model_type(self)
        return None if kind == "bitnet" and self.linear != "ternary" else kind

    @property
    def is_plain_doge(self) -> bool:
        """Whether transformers' own Doge computes the same from the folder."""
        routed = (self.feed_forward, self.router, self.router_layout)
        return (
            self.mixers == {"dynamic_mask"}
            and (self.dynamic_mask_selection, self.dt_heads, self.qk_norm) == ("keep_window", "kv", True)
            and (self.linear, self.norm_placement, self.residual) == ("dense", "pre", "scaled")
            and (self.feed_forward == "glu" or routed == ("cdmoe", "linear", "legacy"))
        )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = fields.get("model_type", cls.model_type)
        if found not in FAMILIES and found not in OTHERS:
            raise ThriftyError(
                f"[{cls.__name__}] reads model_type {', '.join((*FAMILIES, *OTHERS))}; got '{found}' in "
                f"{pretrained_model_name_or_path}; load it with transformers, or with thrifty.runtime"
            )
        family = FAMILIES.get(found, ThriftyConfig)
        fields = family.read_folder(fields)
        if found in OTHERS:
            fields = choices_of(Path(pretrained_model_name_or_path), fields)
        if found in _PLAIN and fields.get("quantization_config"):
            # transformers' AutoBitLinear multiplies biases by the scale of the weight.
            record = fields["quantization_config"]
            fields["quantization_config"] = {**record, "bias_scaled": True}
            if record.get("use_rms_norm"):
                fields["linear_norm_eps"] = record.get("rms_norm_eps", 1e-6)
        if family is not cls:
            # Fields left out have the defaults of the family that wrote the folder.
            written = {name: value for name, value in fields.items() if name != "model_type"}
            fields = PreTrainedConfig.to_dict(family(**written))
        # All names stand for this decoder, so the base class has no cause to warn.
        return {**fields, "model_type": cls.model_type}, kwargs

    @classmethod
    def read_folder(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a config.json of this family, with what it leaves unsaid."""
        return fields

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        kind = self.plain_type or ("thrifty" if self.model_type in _PLAIN else self.model_type)
        fields["model_type"] = kind
        if fields.get("architectures"):
            fields["architectures"] = [_FAMILY_NAMES[kind] + _without_family(name) for name in fields["architectures"]]
        if kind in _PLAIN:
            moe = self.feed_forward == "cdmoe"
            dropped = MIXTURE_FIELDS - _PLAIN[kind] - ({"router_layout"} if moe else set())
            fields = {name: value for name, value in fields.items() if name not in dropped}
            if kind == "doge":
                fields["is_moe"] = moe
        return fields

    def _read_seed_fields(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Set what the seed's and transformers' other names for fields say; returns the arguments that are left."""
        for old, names in SEED_FIELDS.items():
            if kwargs.get(old) is not None:
                for name in names:
                    setattr(self, name, kwargs[old])
            kwargs.pop(old, None)
        if kwargs.pop("is_moe", False):
            self.feed_forward = "cdmoe"
        if kwargs.pop("is_causal", False):
            self.token_mixers = "attention"
        period, offset = kwargs.pop("attn_layer_period", None), kwargs.pop("attn_layer_offset", None)
        if period is not None or offset is not None or self.token_mixers is None:
            self.token_mixers = pattern(self.num_hidden_layers, period, offset)
        if self.dynamic_mask_ratio and self.dynamic_mask_selection == "keep_window":
            self.dynamic_mask_selection = "ratio"
        scaling = kwargs.get("rope_scaling") or {}
        first = scaling.get("original_max_position_embeddings", 0)
        if scaling.get("rope_type", scaling.get("type")) == "dynamic" and first >= self.max_position_embeddings:
            # It begins to scale beyond the positions that the decoder takes.
            del kwargs["rope_scaling"]
        return kwargs


class BitNetConfig(ThriftyConfig):
    """The decoder as BitNet b1.58 (2B4T) has it, with transformers' defaults (`transformers.BitNetConfig`)."""

    model_type = "bitnet"
    default_theta = 500_000.0

    vocab_size: int = 128_256
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 30
    num_attention_heads: int = 20
    num_key_value_heads: int | None = 5
    hidden_act: str = "relu2"
    bos_token_id: int | None = 128_000
    eos_token_id: int | list[int] | None = 128_001
    tie_word_embeddings: bool = False


class DogeConfig(ThriftyConfig):
    """The decoder as Doge has it: dynamic mask attention, scaled residuals, dense linears (arXiv 2412.11834).

    Defaults are those of `transformers.DogeConfig`, whose `is_moe` is read as feed_forward "cdmoe"; the seed's names
    (`hidden_bias`, `num_cdmoe_experts`, ...) are read too. The published generations differ in dt_heads, qk_norm and
    router: a folder of the seed says so itself, one of small-doge needs dt_heads="attention", qk_norm=False.
    """

    model_type = "doge"

    vocab_size: int = 32_768
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 32
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    token_mixers: str | list[str] | None = "dynamic_mask"
    linear: str = "dense"
    norm_placement: str = "pre"
    residual: str = "scaled"
    qk_norm: bool = True

    @classmethod
    def read_folder(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a config.json of transformers, or of the seed."""
        if fields.get("is_moe") and "router_layout" not in fields and "hidden_bias" not in fields:
            logger.warning_once(
                "[DogeConfig] transformers' MoE mixes tokens in its router; here each token routes itself: for the "
                "logits of transformers give router_layout='legacy'"
            )
        return _seed_generation(fields)


class CheemsConfig(ThriftyConfig):
    """The decoder as Cheems has it: seven layers of SSD to one of dynamic mask attention (arXiv 2412.11834).

    token_mixers=None is that pattern: the seed's `attn_layer_period` 8 and `attn_layer_offset` 7, which are read too.
    """

    model_type = "cheems"

    vocab_size: int = 32_768
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 32
    rms_norm_eps: float = 1e-6
    token_mixers: str | list[str] | None = None
    linear: str = "dense"
    norm_placement: str = "pre"
    residual: str = "scaled"
    qk_norm: bool = True

    @classmethod
    def read_folder(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a config.json of this package, or of the seed."""
        return _seed_generation(fields)


class MatMulFreeConfig(ThriftyConfig):
    """The decoder as the matmul-free language model: MLGRU and GLU of ternary linears (arXiv 2406.02528)."""

    model_type = "matmulfree"

    token_mixers: str | list[str] | None = "mlgru"
    attention_bias: bool = True


#: Configurations by the model types that they read and write.
FAMILIES: dict[str, type[ThriftyConfig]] = {
    family.model_type: family for family in (ThriftyConfig, BitNetConfig, DogeConfig, CheemsConfig, MatMulFreeConfig)
}
#: Model types of transformers that are read as they are.
OTHERS = ("llama", "mistral", "qwen2", "qwen3")
_FAMILY_NAMES = {
    "thrifty": "Thrifty",
    "bitnet": "BitNet",
    "doge": "Doge",
    "cheems": "Cheems",
    "matmulfree": "MatMulFree",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
#: Model types of transformers, with the fields beside the common ones that its config has; `linear` says of those that
#: may be dense what a config alone, without tensors, would leave open.
_PLAIN = {
    "bitnet": set(),
    "llama": {"mlp_bias", "linear"},
    "mistral": {"linear"},
    "qwen2": {"linear"},
    "qwen3": {"linear"},
    "doge": {
        *("hidden_dropout", "mlp_bias", "keep_window_size", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
        *("output_router_logits", "router_aux_loss_coef", "sliding_window"),
    },
}


def _without_family(name: str) -> str:
    for family in _FAMILY_NAMES.values():
        name = name.removeprefix(family)
    return name


def _seed_generation(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a folder; where the seed wrote it, with the choices that its models had no field for."""
    if "hidden_bias" not in fields:
        return fields
    selection = "ratio" if fields.get("dynamic_mask_ratio") else "none"
    return {
        "dt_heads": "attention",
        "qk_norm": False,
        "router": "product_key_heads",
        "dynamic_mask_selection": selection,
        "tie_word_embeddings": True,
        **fields,
    }
