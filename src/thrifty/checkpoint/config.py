"""config.json of a decoder as a frozen record."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from thrifty.errors import ThriftyError
from thrifty.spec import ACTIVATIONS

#: Rotary base where config.json names none, by model type.
ROPE_THETA = {"bitnet": 500_000.0, "thrifty": 10_000.0}
#: Positive float32 numbers.
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
#: Positions are float32 in the rotary angles, which holds no larger whole numbers one by one.
MOST_POSITIONS = 1 << 24


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
        model_type = self.one_of("model_type", ("bitnet", "thrifty"))
        own = model_type == "thrifty"
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
        self.token_mixers(own)
        linear = self.one_of("linear", ("ternary", "binary", "dense"), "ternary") if own else "ternary"
        return DecoderConfig(
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_hidden_layers=self.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=self.one_of("hidden_act", tuple(ACTIVATIONS), "relu2"),
            max_position_embeddings=positions,
            rms_norm_eps=self.positive("rms_norm_eps", 1e-5),
            rope_theta=self.rope_theta(ROPE_THETA[model_type]),
            tie_word_embeddings=self.boolean("tie_word_embeddings", False),
            attention_bias=self.boolean("attention_bias", False),
            feed_forward=self.one_of("feed_forward", ("glu", "mlp"), "glu") if own else "glu",
            linear=linear,
            norm_placement=self.one_of("norm_placement", ("pre", "sub_ln"), "sub_ln") if own else "sub_ln",
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
        if kind != "default":
            raise self.error("rope_type", "be 'default'", kind)
        reader = _Reader(self.path, parameters if parameters.get("rope_theta") is not None else self.fields)
        return reader.positive("rope_theta", default)

    def token_mixers(self, own: bool) -> None:
        mixers = self.fields.get("token_mixers") if own else None
        names = [mixers] if isinstance(mixers, str) else mixers
        if names is not None and (not isinstance(names, list) or any(name != "attention" for name in names)):
            raise self.error("token_mixers", "be 'attention' in every layer", mixers)

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
