"""Token mixing without attention, the block around it, and parts of other transformers."""

from typing import Any

import keras

from thrifty.errors import ThriftyError
from thrifty.keras.layers.activations import SwiGLUMML
from thrifty.keras.layers.cached_attention import CachedMultiHeadAttention
from thrifty.keras.layers.core import PackedParts, RMSNorm, positive
from thrifty.keras.layers.recurrent import GRUMML

__all__ = ["AttentionMML", "CachedMultiHeadAttention", "FeedForwardGate", "TransformerBlockMML"]


@keras.saving.register_keras_serializable(package="thrifty")
class AttentionMML(PackedParts, keras.layers.Layer):
    """`GRUMML(out_dim, fully_mml, num_heads, return_sequences=True)`: what mixes tokens in place of attention.

    Causal: y_t depends on x_0 ... x_t (MatMul-free LM, arXiv 2406.02528, 3.3). [B, T, d] -> [B, T, out_dim], T may be
    None. mask [B, T]: a masked step leaves the state untouched. Raises ThriftyError where num_heads or out_dim is no
    positive integer, or out_dim no multiple of num_heads.
    """

    def __init__(self, num_heads: int, out_dim: int, fully_mml: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = positive("AttentionMML", "num_heads", num_heads)
        self.out_dim = positive("AttentionMML", "out_dim", out_dim)
        _check_heads("AttentionMML", "out_dim", out_dim, num_heads)
        self.fully_mml = fully_mml
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.mixer = GRUMML(out_dim, fully_mml, num_heads, return_sequences=True, dtype=self.dtype_policy, name="mixer")

    def build(self, input_shape) -> None:
        self.mixer.build(input_shape)

    def call(self, inputs, mask=None):
        return self.mixer(inputs, mask=mask)

    def compute_output_shape(self, input_shape) -> tuple:
        return (*input_shape[:-1], self.out_dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "out_dim": self.out_dim,
            "fully_mml": self.fully_mml,
        }


@keras.saving.register_keras_serializable(package="thrifty")
class TransformerBlockMML(PackedParts, keras.layers.Layer):
    """a = RMSNorm(x + drop(AttentionMML(x))),  y = RMSNorm(a + drop(SwiGLUMML(a))).

    [B, T, embedding_dim] -> the same, T may be None; ffn_dim is the intermediate size of `SwiGLUMML`, num_heads and
    fully_mml are those of `AttentionMML`, rate that of both dropouts. mask [B, T]: as for `GRUMML`; passed on.

    Raises ThriftyError where a size is no positive integer, embedding_dim is no multiple of num_heads or not the number
    of features that comes in, and where rate is not in [0, 1).
    """

    def __init__(
        self,
        embedding_dim: int,
        ffn_dim: int,
        num_heads: int,
        fully_mml: bool = True,
        rate: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.embedding_dim = positive("TransformerBlockMML", "embedding_dim", embedding_dim)
        self.ffn_dim = positive("TransformerBlockMML", "ffn_dim", ffn_dim)
        self.num_heads = positive("TransformerBlockMML", "num_heads", num_heads)
        _check_heads("TransformerBlockMML", "embedding_dim", embedding_dim, num_heads)
        if not 0 <= rate < 1:
            raise ThriftyError(f"[TransformerBlockMML] rate must be in [0, 1); got {rate}; give the share dropped")
        self.fully_mml = fully_mml
        self.rate = rate
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)
        policy = self.dtype_policy
        self.attention = AttentionMML(num_heads, embedding_dim, fully_mml, dtype=policy, name="attention")
        self.feed_forward = SwiGLUMML(embedding_dim, intermediate_size=ffn_dim, dtype=policy, name="feed_forward")
        self.attention_norm = RMSNorm(dtype=policy, name="attention_norm")
        self.feed_forward_norm = RMSNorm(dtype=policy, name="feed_forward_norm")
        self.attention_dropout = keras.layers.Dropout(rate, dtype=policy, name="attention_dropout")
        self.feed_forward_dropout = keras.layers.Dropout(rate, dtype=policy, name="feed_forward_dropout")

    def build(self, input_shape) -> None:
        if input_shape[-1] != self.embedding_dim:
            raise ThriftyError(
                f"[TransformerBlockMML] inputs must have embedding_dim = {self.embedding_dim} features, which "
                f"are added to the outputs; got {input_shape[-1]}; project them first"
            )
        for layer in (self.attention, self.feed_forward, self.attention_norm, self.feed_forward_norm):
            layer.build(input_shape)

    def call(self, inputs, mask=None, training=None):
        mixed = self.attention_dropout(self.attention(inputs, mask=mask), training=training)
        hidden = self.attention_norm(inputs + mixed)
        return self.feed_forward_norm(hidden + self.feed_forward_dropout(self.feed_forward(hidden), training=training))

    def compute_output_shape(self, input_shape) -> tuple:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "embedding_dim": self.embedding_dim,
            "ffn_dim": self.ffn_dim,
            "num_heads": self.num_heads,
            "fully_mml": self.fully_mml,
            "rate": self.rate,
        }


def _check_heads(layer: str, name: str, size: int, num_heads: int) -> None:
    if size % num_heads:
        raise ThriftyError(f"[{layer}] {name} must be a multiple of num_heads = {num_heads}; got {size}; change either")


@keras.saving.register_keras_serializable(package="thrifty")
class FeedForwardGate(keras.layers.Layer):
    """y = (gelu(x W_g) * (x W_l)) W_o, without biases; gelu(z) = z Phi(z), not its tanh form (GEGLU, arXiv 2002.05202).

    x: [..., d] -> [..., input_dim], d need not be input_dim; W_g, W_l: [d, hidden_dim], W_o: [hidden_dim, input_dim].
    Masks pass. Raises ThriftyError where a size is not a positive integer.
    """

    def __init__(self, input_dim: int, hidden_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, size in (("input_dim", input_dim), ("hidden_dim", hidden_dim)):
            if not isinstance(size, int) or size < 1:
                raise ThriftyError(f"[FeedForwardGate] {name} must be a positive integer; got {size}; give 1 or more")
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.supports_masking = True
        self._gelu = self._dense(hidden_dim, "gate", activation="gelu")
        self._linear = self._dense(hidden_dim, "linear")
        self._output = self._dense(input_dim, "output")

    def _dense(self, units: int, name: str, activation: str | None = None) -> keras.layers.Dense:
        return keras.layers.Dense(units, activation, use_bias=False, name=name, dtype=self.dtype_policy)

    def build(self, input_shape) -> None:
        self._gelu.build(input_shape)
        self._linear.build(input_shape)
        self._output.build((*input_shape[:-1], self.hidden_dim))

    def call(self, inputs):
        return self._output(self._gelu(inputs) * self._linear(inputs))

    def compute_output_shape(self, input_shape) -> tuple:
        return (*input_shape[:-1], self.input_dim)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "input_dim": self.input_dim, "hidden_dim": self.hidden_dim}
