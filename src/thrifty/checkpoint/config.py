"""config.json of a decoder as a frozen record."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from thrifty.errors import ThriftyError
from thrifty.spec import ACTIVATIONS

#: Rotary base where config.json names none, by model type.
ROPE_THETA = {"bitnet": 500_000.0, "thrifty": 10_000.0, "doge": 10_000.0, "cheems": 10_000.0, "matmulfree": 10_000.0}
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
    feed_forward: Literal["glu", "mlp"] = "glu"
    linear: Literal["ternary", "binary", "dense"] = "ternary"
    norm_placement: Literal["pre", "sub_ln"] = "sub_ln"
    mlp_bias: bool = False
    #: The token mixer of each layer; the last one goes on.
    mixers: tuple[str, ...] = ("attention",)
    #: "scaled": a learned factor per channel on the path around a block.
    residual: Literal["plain", "scaled"] = "plain"
    #: Norms of queries and keys, of a dynamic mask.
    qk_norm: bool = False
    #: What scores a key of a dynamic mask: a kv head, or each query head.
    dt_heads: Literal["kv", "attention"] = "kv"
    #: Keys that a dynamic mask keeps; None for all.
    window: int | None = None
    ssd_rotary: bool = True
    experts: ExpertsConfig | None = None
    #: How linear weights are stored: as codes and a scale that multiplies or divides, or as float (latent) weights.
    storage: Literal["multiplies", "divides", "latent"] = "multiplies"

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
    return _Reader(path, read_json(path)).config()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ThriftyError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ThriftyError(f"[checkpoint] a checkpoint folder must have {path.name}; {path} is absent") from None
    except (ValueError, RecursionError) as error:
        raise ThriftyError(f"[checkpoint] {path} must be JSON; {error}; save it again") from error
    if not isinstance(content, dict):
        raise ThriftyError(f"[checkpoint] {path} must hold a JSON object; got {type(content).__name__}; save it again")
    return content


class _Reader:
    """Fields of config.json, checked one by one so that an error names the field."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def config(self) -> DecoderConfig:
        model_type = self.one_of("model_type", tuple(ROPE_THETA))
        # Those of transformers leave unsaid what they all have in common.
        own, doge = model_type not in ("bitnet", "doge"), model_type == "doge"
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.error("num_key_value_heads", f"divide num_attention_heads ({heads})", kv_heads)
        if self.fields.get("head_dim") is None and hidden % heads:
            raise self.error("num_attention_heads", f"divide hidden_size ({hidden}) where no head_dim is given", heads)
        head_dim = self.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise self.error("head_dim", "be even (rotary positions turn pairs)", head_dim)
        positions = self.integer("max_position_embeddings", 2048)
        if positions > MOST_POSITIONS:
            raise self.error("max_position_embeddings", f"be at most {MOST_POSITIONS}", positions)
        layers = self.integer("num_hidden_layers")
        mixers = self.mixers(model_type, layers)
        masked = "dynamic_mask" in mixers
        linear = self.one_of("linear", ("ternary", "binary", "dense"), "ternary") if own else "ternary"
        linear = "dense" if doge else linear
        plain_norms = "pre" if doge else "sub_ln"
        return DecoderConfig(
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=self.one_of("hidden_act", tuple(ACTIVATIONS), "relu2" if model_type == "bitnet" else "silu"),
            max_position_embeddings=positions,
            rms_norm_eps=self.positive("rms_norm_eps", 1e-6 if doge else 1e-5),
            rope_theta=self.rope_theta(ROPE_THETA[model_type]),
            tie_word_embeddings=self.boolean("tie_word_embeddings", False),
            attention_bias=self.boolean("attention_bias", False),
            feed_forward="mlp" if own and self.fields.get("feed_forward") == "mlp" else "glu",
            linear=linear,
            norm_placement=self.one_of("norm_placement", ("pre", "sub_ln"), "sub_ln") if own else plain_norms,
            mlp_bias=self.boolean("mlp_bias", False),
            mixers=mixers,
            residual=self.one_of("residual", ("plain", "scaled"), "plain") if own else "scaled" if doge else "plain",
            qk_norm=masked and (doge or self.boolean("qk_norm", False)),
            dt_heads=self.one_of("dt_heads", ("kv", "attention"), "kv"),
            window=self.window(positions) if masked else None,
            ssd_rotary=self.boolean("ssd_rotary", True),
            experts=self.experts(own),
            storage="latent" if linear == "dense" else self.storage(),
        )

    def storage(self) -> Literal["multiplies", "divides", "latent"]:
        """What quantization_config says of the weights; the two classes of transformers disagree on the scale."""
        quantization = self.fields.get("quantization_config")
        if quantization is None:
            return "latent"
        reader = _Reader(self.path, quantization if isinstance(quantization, dict) else {})
        reader.one_of("quant_method", ("bitnet",))
        linear_class = reader.one_of("linear_class", ("bitlinear", "autobitlinear"), "bitlinear")
        mode = reader.one_of("quantization_mode", ("online", "offline"), "offline")
        if reader.boolean("use_rms_norm", False):
            raise reader.error("use_rms_norm", "be false (norms before each linear are not read yet)", True)
        kept = quantization.get("modules_to_not_convert") or []
        if not isinstance(kept, list) or any(
            name not in ("lm_head", "model.embed_tokens", "embed_tokens") for name in kept
        ):
            raise reader.error("modules_to_not_convert", "list nothing but the output head and embedding", kept)
        if mode == "online":
            return "latent"
        return "multiplies" if linear_class == "autobitlinear" else "divides"

    def rope_theta(self, default: float) -> float:
        """`rope_parameters.rope_theta` (transformers 5) or `rope_theta` (before); scaled variants are refused."""
        parameters = self.fields.get("rope_parameters") or self.fields.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise self.error("rope_parameters", "be an object", parameters)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        first = parameters.get("original_max_position_embeddings", 0)
        # The published Doge begins to scale beyond the positions that it takes.
        unscaled = kind == "dynamic" and first >= self.integer("max_position_embeddings", 2048)
        if kind != "default" and not unscaled:
            raise self.error("rope_type", "be 'default'", kind)
        reader = _Reader(self.path, parameters if parameters.get("rope_theta") is not None else self.fields)
        return reader.positive("rope_theta", default)

    def mixers(self, model_type: str, layers: int) -> tuple[str, ...]:
        """The token mixer of each layer, from the pattern `token_mixers`."""
        if model_type in ("bitnet", "doge"):
            return ("attention" if model_type == "bitnet" else "dynamic_mask",)
        given = self.given("token_mixers", "attention" if model_type == "thrifty" else None)
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
