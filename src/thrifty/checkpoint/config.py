"""config.json of a decoder as a frozen record."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from thrifty.checkpoint.families import FAMILIES, Family, family_of
from thrifty.errors import ThriftyError
from thrifty.spec import ACTIVATIONS, RopeScaling

#: What a layer can mix tokens with.
TOKEN_MIXERS = ("attention", "dynamic_mask", "mlgru", "ssd")
#: Positive float32 numbers.
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
#: More layers than any model has; where layers differ they are listed one by one.
MOST_LAYERS = 1 << 16
#: Positions are float32 in the rotary angles, which holds no larger whole numbers one by one.
MOST_POSITIONS = 1 << 24


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts of one hidden unit beside the gated feed-forward, and how they are chosen."""

    #: A square, one expert for each pair of keys.
    count: int
    #: Experts that a head of the router takes.
    per_head: int
    heads: int
    #: "linear": scores from one matrix; "product_key_heads": from queries of `retrieval` features against keys.
    router: Literal["linear", "product_key_heads"]
    retrieval: int
    #: Whether the weights of all heads sum to one.
    norm_topk_prob: bool

    @property
    def keys(self) -> int:
        """Keys on each side."""
        return math.isqrt(self.count)


@dataclass(frozen=True)
class DecoderConfig:
    """What the arrays of a decoder are and how they are used; names as in transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attention_bias: bool
    #: The key in `thrifty.checkpoint.families.FAMILIES`.
    family: str = "thrifty"
    rope_scaling: RopeScaling | None = None
    #: Whether o_proj has a bias where q, k and v have one.
    attention_out_bias: bool = True
    feed_forward: Literal["glu", "mlp"] = "glu"
    linear: Literal["ternary", "binary", "dense"] = "ternary"
    norm_placement: Literal["pre", "sub_ln"] = "sub_ln"
    mlp_bias: bool = False
    #: The token mixer of each layer; the last one goes on.
    mixers: tuple[str, ...] = ("attention",)
    #: "scaled": a learned factor per channel on the path around a block.
    residual: Literal["plain", "scaled"] = "plain"
    #: Norms of queries and keys, head by head: of a dynamic mask, of attention.
    qk_norm: bool = False
    attention_qk_norm: bool = False
    #: eps of a norm with gain in front of every low-bit linear; None where there is none.
    linear_norm_eps: float | None = None
    #: Whether the output head is a ternary linear of float weights, with its norm where linears have one.
    ternary_head: bool = False
    #: Whether gates of an hgrn have learned lower bounds.
    gate_bounds: bool = False
    #: Whether gate_proj and up_proj are halves of one latent matrix, which has one scale.
    fused_gate_up: bool = False
    #: What scores a key of a dynamic mask: a kv head, or each query head.
    dt_heads: Literal["kv", "attention"] = "kv"
    #: Keys that a dynamic mask keeps; None for all.
    window: int | None = None
    ssd_rotary: bool = True
    experts: ExpertsConfig | None = None
    #: How linear weights are stored: as codes and a scale that multiplies or divides, or as float (latent) weights.
    storage: Literal["multiplies", "divides", "latent"] = "multiplies"
    #: What the scale of a latent weight is rounded to in the forward pass: bfloat16 here, nothing in transformers.
    latent_scale: Literal["bfloat16", "float32"] = "bfloat16"
    #: transformers' AutoBitLinear multiplies the bias by the scale of the weight too.
    bias_scaled: bool = False

    @property
    def q_size(self) -> int:
        """Features of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key (or value) heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def score_heads(self) -> int:
        """Heads that score keys of a dynamic mask."""
        return self.num_key_value_heads if self.dt_heads == "kv" else self.num_attention_heads

    def mixer(self, layer: int) -> str:
        """The token mixer of a layer."""
        return self.mixers[min(layer, len(self.mixers) - 1)]


def read_config(path: str | Path) -> DecoderConfig:
    """The record of a config.json.

    Raises ThriftyError where the file is absent, is no JSON object, or asks for something not run here.
    """
    path = Path(path)
    return config_of(path, read_json(path))


def config_of(path: Path, fields: Mapping[str, Any]) -> DecoderConfig:
    """The record of the fields of a config.json; `path` is for errors."""
    return _Reader(path, fields).config()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ThriftyError that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ThriftyError(f"[checkpoint] a checkpoint folder must have {path.name}; {path} is absent") from None
    except ValueError as error:
        raise ThriftyError(f"[checkpoint] {path} must be JSON; {error}; save it again") from error
    return parse_json(path, text)


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """A JSON object from the text of a file. Raises ThriftyError that names the file."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ThriftyError(f"[checkpoint] {path} must be JSON; {error}; save it again") from error
    if not isinstance(content, dict):
        raise ThriftyError(f"[checkpoint] {path} must hold a JSON object; got {type(content).__name__}; save it again")
    return content


def leaves_out_the_head(kept: Any) -> bool:
    """Whether `modules_to_not_convert` says that all linears are low-bit but the head.

    Where it is null transformers leaves out the head by itself, and else nothing but what is listed.
    """
    known = ("lm_head", "model.embed_tokens", "embed_tokens")
    return kept is None or (isinstance(kept, list) and "lm_head" in kept and all(name in known for name in kept))


class _Reader:
    """Fields of config.json, checked one by one so that an error names the field."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def config(self) -> DecoderConfig:
        name = self.family()
        family = FAMILIES[name]
        own = family.own
        if name == "hgrn_bit":
            self.fields = self.matmulfree()
        hidden, heads, kv_heads, head_dim = self.widths()
        positions = self.integer("max_position_embeddings", 2048)
        if positions > MOST_POSITIONS:
            raise self.error("max_position_embeddings", f"be at most {MOST_POSITIONS}", positions)
        layers = self.integer("num_hidden_layers")
        mixers = self.mixers(name, layers)
        masked = "dynamic_mask" in mixers
        if "attention" in mixers:
            self.whole_attention(name, positions)
        linear = self.linear(name)
        storage = "latent" if linear == "dense" else self.storage()
        return DecoderConfig(
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=self.one_of("hidden_act", tuple(ACTIVATIONS), family.hidden_act),
            max_position_embeddings=positions,
            rms_norm_eps=self.positive("rms_norm_eps", family.rms_norm_eps),
            rope_theta=self.rope_theta(family.rope_theta),
            rope_scaling=self.rope_scaling(),
            tie_word_embeddings=self.boolean("tie_word_embeddings", False),
            attention_bias=family.attention_bias or self.boolean("attention_bias", False),
            family=name,
            attention_out_bias=self.boolean("attention_out_bias", True) if own else family.attention_out_bias,
            feed_forward="mlp" if own and self.fields.get("feed_forward") == "mlp" else "glu",
            linear=linear,
            norm_placement=self.one_of("norm_placement", ("pre", "sub_ln"), "sub_ln") if own else family.norm_placement,
            mlp_bias=self.boolean("mlp_bias", False),
            mixers=mixers,
            residual=self.one_of("residual", ("plain", "scaled"), "plain") if own else family.residual,
            qk_norm=masked and (family.qk_norm or self.boolean("qk_norm", False)),
            attention_qk_norm=self.boolean("attention_qk_norm", False) if own else family.attention_qk_norm,
            linear_norm_eps=self.linear_norm_eps(family) if linear != "dense" else None,
            ternary_head=family.ternary_head,
            gate_bounds=name == "hgrn_bit" and self.boolean("use_lower_bound", True),
            fused_gate_up=name == "hgrn_bit" and storage == "latent",
            dt_heads=self.one_of("dt_heads", ("kv", "attention"), "kv"),
            window=self.window(positions) if masked else None,
            ssd_rotary=self.boolean("ssd_rotary", True),
            experts=self.experts(own),
            storage=storage,
            latent_scale=self.latent_scale(family) if linear != "dense" else "bfloat16",
            bias_scaled=storage == "multiplies" and not own,
        )

    def widths(self) -> tuple[int, int, int, int]:
        """hidden_size, num_attention_heads, num_key_value_heads and head_dim."""
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.error("num_key_value_heads", f"divide num_attention_heads ({heads})", kv_heads)
        if self.fields.get("head_dim") is None and hidden % heads:
            raise self.error("num_attention_heads", f"divide hidden_size ({hidden}) where no head_dim is given", heads)
        head_dim = self.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise self.error("head_dim", "be even (rotary positions turn pairs)", head_dim)
        return hidden, heads, kv_heads, head_dim

    def family(self) -> str:
        """The key in FAMILIES."""
        found = family_of(self.fields)
        if found is None:
            types = [name for name in FAMILIES if name != "1bitLLM"]
            raise self.error("model_type", f"be one of {', '.join(types)}", self.fields.get("model_type"))
        return found

    def linear(self, family: str) -> Any:
        """What the linears are: a choice in the model types of this package, else as the quantization_config says."""
        if FAMILIES[family].own:
            return self.one_of("linear", ("ternary", "binary", "dense"), "ternary")
        quantized = family != "doge" and self.fields.get("quantization_config") is not None
        return "ternary" if quantized or FAMILIES[family].ternary else "dense"

    def whole_attention(self, family: str, positions: int) -> None:
        """Refuses attention to a window of keys, unless it holds all positions."""
        window = self.fields.get("sliding_window")
        used = self.boolean("use_sliding_window", not family.startswith("qwen"))
        if window is not None and used and (type(window) is not int or window < positions):
            raise self.error("sliding_window", "be null, as attention here is to all keys", window)

    def storage(self) -> Literal["multiplies", "divides", "latent"]:
        """What quantization_config says of the weights; the two classes of transformers disagree on the scale."""
        if self.fields.get("quantization_config") is None:
            return "latent"
        reader = self.quantization()
        reader.one_of("quant_method", ("bitnet",))
        linear_class = reader.one_of("linear_class", ("bitlinear", "autobitlinear"), "bitlinear")
        mode = reader.one_of("quantization_mode", ("online", "offline"), "offline")
        kept = reader.fields.get("modules_to_not_convert")
        if not leaves_out_the_head(kept):
            raise reader.error("modules_to_not_convert", "list the output head, and nothing else but embeddings", kept)
        if linear_class == "autobitlinear":
            return "latent" if mode == "online" else "multiplies"
        return "divides"

    def matmulfree(self) -> dict[str, Any]:
        """The fields of a published MatMul-free LM, with what follows from others."""
        if self.boolean("use_short_conv", False):
            raise self.error("use_short_conv", "be false", True)
        if self.given("expand_ratio", 1) != 1:
            raise self.error("expand_ratio", "be 1", self.fields["expand_ratio"])
        if self.boolean("tie_word_embeddings", False):
            raise self.error("tie_word_embeddings", "be false, as the head is ternary and the embedding is not", True)
        two_thirds = self.integer("hidden_size") * self.integer("hidden_ratio", 4) * 2 // 3
        inner, act = self.integer("intermediate_size", -(-two_thirds // 256) * 256), self.given("hidden_act", "swish")
        # No layer has heads, or rotary positions.
        shape = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": inner}
        return {**self.fields, **shape, "hidden_act": "silu" if act == "swish" else act}

    def linear_norm_eps(self, family: Family) -> float | None:
        """eps of the norms in front of every linear, where there are some: transformers', or a family's own."""
        if family.linear_norm_eps is not None:
            return family.linear_norm_eps
        reader = self.quantization()
        return reader.positive("rms_norm_eps", 1e-6) if reader.boolean("use_rms_norm", False) else None

    def latent_scale(self, family: Family) -> Literal["bfloat16", "float32"]:
        """Whether training rounded the scales: this package says that it does."""
        default = "bfloat16" if family.own else "float32"
        return self.quantization().one_of("scale_dtype", ("bfloat16", "float32"), default)

    def quantization(self) -> "_Reader":
        """A reader of quantization_config, which may be absent."""
        quantization = self.fields.get("quantization_config")
        return _Reader(self.path, quantization if isinstance(quantization, dict) else {})

    def rope(self) -> "_Reader":
        """A reader of `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
        parameters = self.fields.get("rope_parameters") or self.fields.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise self.error("rope_parameters", "be an object", parameters)
        return _Reader(self.path, parameters)

    def rope_theta(self, default: float) -> float:
        """The base of the rotary positions, which older configs have beside the object."""
        rope = self.rope()
        return (rope if rope.fields.get("rope_theta") is not None else self).positive("rope_theta", default)

    def rope_scaling(self) -> RopeScaling | None:
        """How frequencies are scaled, where they are; only Llama 3's way is known."""
        rope = self.rope()
        kind = rope.given("rope_type", rope.fields.get("type", "default"))
        if kind == "default":
            return None
        positions = rope.integer("original_max_position_embeddings", None if kind == "llama3" else 1)
        # The published Doge begins to scale beyond the positions that it takes.
        if kind == "dynamic" and positions >= self.integer("max_position_embeddings", 2048):
            return None
        if kind != "llama3":
            raise self.error("rope_type", "be 'default' or 'llama3'", kind)
        names = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (rope.positive(name, 0.0) for name in names)
        if low >= high:
            raise rope.error("high_freq_factor", f"be above low_freq_factor ({low})", high)
        if positions > MOST_POSITIONS:
            raise rope.error("original_max_position_embeddings", f"be at most {MOST_POSITIONS}", positions)
        return RopeScaling(factor, low, high, positions)

    def mixers(self, family: str, layers: int) -> tuple[str, ...]:
        """The token mixer of each layer, from the pattern `token_mixers`."""
        if not FAMILIES[family].own:
            return (FAMILIES[family].mixer,)
        given = self.given("token_mixers", "attention" if family == "thrifty" else None)
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not names or any(name not in TOKEN_MIXERS for name in names):
            raise self.error("token_mixers", f"be of {', '.join(TOKEN_MIXERS)}", given)
        if len(set(names)) == 1:
            return (names[0],)
        if layers % len(names):
            raise self.error("token_mixers", f"repeat to {layers} layers", given)
        if layers > MOST_LAYERS:
            raise self.error("num_hidden_layers", f"be at most {MOST_LAYERS} where layers differ", layers)
        return tuple(names) * (layers // len(names))

    def window(self, positions: int) -> int | None:
        """Keys that a dynamic mask keeps."""
        if self.fields.get("sliding_window") is not None:
            raise self.error(
                "sliding_window", "be null, as a dynamic mask lets no key return", self.fields["sliding_window"]
            )
        selection = self.one_of("dynamic_mask_selection", ("keep_window", "ratio", "none"), "keep_window")
        if selection == "keep_window":
            return self.integer("keep_window_size", 2048)
        if selection == "none":
            return None
        kept = int(self.positive("dynamic_mask_ratio", 0.0) * positions)
        if not 1 <= kept <= positions:
            raise self.error(
                "dynamic_mask_ratio", "keep at least one key and at most all", self.fields["dynamic_mask_ratio"]
            )
        return kept

    def experts(self, own: bool) -> ExpertsConfig | None:
        """The experts, where the feed-forward has some."""
        routed = (
            self.one_of("feed_forward", ("glu", "mlp", "cdmoe"), "glu") == "cdmoe"
            if own
            else self.boolean("is_moe", False)
        )
        if not routed:
            return None
        if self.one_of("router_layout", ("per_token", "legacy"), "per_token") == "legacy":
            raise self.error("router_layout", "be 'per_token' (tokens route themselves)", "legacy")
        router = self.one_of("router", ("linear", "product_key_heads"), "linear")
        experts = ExpertsConfig(
            count=self.integer("num_experts", 16_384),
            per_head=self.integer("num_experts_per_tok", 64),
            heads=self.integer("num_experts_heads", 1),
            router=router,
            retrieval=self.integer("expert_retrieval_size", 64),
            norm_topk_prob=self.boolean("norm_topk_prob", False),
        )
        if experts.keys**2 != experts.count:
            raise self.error("num_experts", "be a square, an expert for each pair of keys", experts.count)
        if experts.per_head > experts.count:
            raise self.error("num_experts_per_tok", f"be at most num_experts ({experts.count})", experts.per_head)
        if router == "product_key_heads" and experts.retrieval % 2:
            raise self.error("expert_retrieval_size", "be even, a half for each key", experts.retrieval)
        return experts

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.given(name, default)
        if type(value) is not int or value <= 0:
            raise self.error(name, "be a positive integer", value)
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.given(name, default)
        if type(value) not in (int, float) or not LEAST <= value <= MOST:
            raise self.error(name, "be a positive number", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.given(name, default)
        if type(value) is not bool:
            raise self.error(name, "be true or false", value)
        return value

    def one_of(self, name: str, choices: tuple[str, ...], default: str | None = None) -> Any:
        value = self.given(name, default)
        if value not in choices:
            raise self.error(name, f"be one of {', '.join(choices)}", value)
        return value

    def given(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def error(self, name: str, rule: str, value: Any) -> ThriftyError:
        got = "nothing" if value is None else repr(value)
        return ThriftyError(f"[config] '{name}' must {rule}; {self.path} has {got}; correct it or convert the model")
