"""Configurations of the decoder: the only home of its defaults."""

from typing import Any

from transformers import PreTrainedConfig

from thrifty.errors import ThriftyError
from thrifty.nn.attention import check_heads
from thrifty.nn.linear import LINEARS
from thrifty.ops import ACTIVATIONS

#: What each choice of a layer can be.
CHOICES = {
    "feed_forward": ("glu", "mlp"),
    "linear": LINEARS,
    "norm_placement": ("sub_ln", "pre"),
    "hidden_act": tuple(ACTIVATIONS),
}
#: Mixers a pattern of layers can name.
TOKEN_MIXERS = ("attention",)
#: Fields that transformers' BitNet does not have.
MIXTURE_FIELDS = ("token_mixers", "feed_forward", "linear", "norm_placement")
#: Model types that this decoder reads.
MODEL_TYPES = ("thrifty", "bitnet")


class ThriftyConfig(PreTrainedConfig):
    """The decoder's shape and choices; fields that transformers' BitNet has too bear its names and meaning.

    token_mixers: a pattern over layers, repeated to `num_hidden_layers`; each entry one of `TOKEN_MIXERS`.
    feed_forward: "glu" or "mlp", with `hidden_act`. linear: "ternary", "binary" or "dense" projections (embedding and
    head are always dense). norm_placement: "sub_ln" (BitNet: also before `o_proj` and `down_proj`) or "pre".
    rope_theta and rope_parameters are both read; only the default kind of rope is known.

    Saved with model_type "bitnet" where plain transformers computes the same from the folder, else "thrifty".
    Raises ThriftyError for a choice that does not exist and for sizes that do not divide.
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
    attention_dropout: float = 0.0
    rope_parameters: dict | None = None
    token_mixers: str | list[str] = "attention"
    feed_forward: str = "glu"
    linear: str = "ternary"
    norm_placement: str = "sub_ln"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if isinstance(self.token_mixers, str):
            self.token_mixers = [self.token_mixers]
        super().__post_init__(**kwargs)
        self._check()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    def mixer(self, layer: int) -> str:
        """The token mixer of a layer."""
        return self.token_mixers[layer % len(self.token_mixers)]

    @property
    def is_plain_bitnet(self) -> bool:
        """Whether transformers' own BitNet computes the same from the packed folder."""
        head_dim = self.head_dim or 0
        widths = (self.hidden_size, self.intermediate_size, (self.num_key_value_heads or 0) * head_dim)
        return (
            all(mixer == "attention" for mixer in self.token_mixers)
            and (self.feed_forward, self.linear, self.norm_placement) == ("glu", "ternary", "sub_ln")
            and not self.attention_bias
            and self.num_attention_heads * head_dim == self.hidden_size
            # transformers' layer takes four rows to a byte and has no padding.
            and all(width % 4 == 0 for width in widths)
        )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = fields.get("model_type", cls.model_type)
        if found not in MODEL_TYPES:
            raise ThriftyError(
                f"[{cls.__name__}] reads model_type {' or '.join(MODEL_TYPES)}; got '{found}' in "
                f"{pretrained_model_name_or_path}; load it with transformers"
            )
        if found == "bitnet" and cls is ThriftyConfig:
            # Fields left out have the defaults of transformers' BitNet; rope comes under several names.
            fields = BitNetConfig(**{name: value for name, value in fields.items() if name != "model_type"}).to_dict()
        # Both names stand for this decoder, so the base class has no cause to warn.
        return {**fields, "model_type": cls.model_type}, kwargs

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        plain = self.is_plain_bitnet
        fields["model_type"] = "bitnet" if plain else "thrifty"
        if fields.get("architectures"):
            family = "BitNet" if plain else "Thrifty"
            fields["architectures"] = [
                family + name.removeprefix("BitNet").removeprefix("Thrifty") for name in fields["architectures"]
            ]
        for name in MIXTURE_FIELDS if plain else ():
            fields.pop(name, None)
        return fields

    def _check(self) -> None:
        name = type(self).__name__
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ThriftyError(
                    f"[{name}] {field} must be one of {', '.join(choices)}; got '{getattr(self, field)}'"
                )
        unknown = [mixer for mixer in self.token_mixers if mixer not in TOKEN_MIXERS]
        if unknown or not self.token_mixers:
            raise ThriftyError(
                f"[{name}] token_mixers must be of {', '.join(TOKEN_MIXERS)}; got {unknown or 'an empty pattern'}"
            )
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        for field in sizes:
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ThriftyError(f"[{name}] {field} must be a positive integer; got {getattr(self, field)!r}")
        if self.num_hidden_layers % len(self.token_mixers):
            raise ThriftyError(
                f"[{name}] the pattern token_mixers must repeat to {self.num_hidden_layers} layers; "
                f"got {len(self.token_mixers)} entries"
            )
        check_heads(self.hidden_size, self.num_attention_heads, self.num_key_value_heads or 0, self.head_dim)
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind != "default":
            raise ThriftyError(f"[{name}] rope_type must be 'default'; got '{kind}'")


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
