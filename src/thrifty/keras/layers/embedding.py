"""Embeddings of tokens, of patches of images, and of positions."""

import operator
from typing import Any

import keras
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras.layers.core import DenseMML, PackedParts, plain, positive
from thrifty.spec import rope_frequencies

#: Beyond this, float32 no longer tells neighbouring positions apart.
MAX_POSITIONS = 1 << 24


@keras.saving.register_keras_serializable(package="thrifty")
class TokenEmbedding(keras.layers.Layer):
    """y_t = E[x_t] (+ P[t] with with_positions), E [vocab_size, embedding_dim], P [max_len, embedding_dim], learned.

    Integers [B, T] -> [B, T, embedding_dim]. With mask_zero, token 0 is padding: False in the mask that is passed on.

    Raises ThriftyError where a size is no positive integer, and where T > max_len. A length that is unknown until the
    graph runs (TensorFlow, T None) is not looked at: with positions, TensorFlow then says that shapes do not fit.
    """

    def __init__(
        self,
        max_len: int,
        vocab_size: int,
        embedding_dim: int,
        with_positions: bool = False,
        *,
        mask_zero: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.max_len = positive("TokenEmbedding", "max_len", max_len)
        self.vocab_size = positive("TokenEmbedding", "vocab_size", vocab_size)
        self.embedding_dim = positive("TokenEmbedding", "embedding_dim", embedding_dim)
        self.with_positions = with_positions
        self.mask_zero = mask_zero
        self.input_spec = keras.layers.InputSpec(ndim=2)
        self.supports_masking = True
        # Tokens are integers, which a float dtype would not hold exactly.
        self.autocast = False
        self.tokens = keras.layers.Embedding(vocab_size, embedding_dim, dtype=self.dtype_policy, name="tokens")
        self.positions = _positions(max_len, embedding_dim, self.dtype_policy) if with_positions else None

    def build(self, input_shape) -> None:
        self._check_length(input_shape[1])
        self.tokens.build(input_shape)
        if self.positions is not None:
            self.positions.build((self.max_len,))

    def call(self, inputs):
        self._check_length(inputs.shape[1])
        embedded = self.tokens(inputs)
        if self.positions is None:
            return embedded
        return embedded + self.positions(ops.arange(self.max_len))[: ops.shape(inputs)[1]]

    def _check_length(self, length: int | None) -> None:
        if length is not None and length > self.max_len:
            raise ThriftyError(
                f"[TokenEmbedding] sequences must have at most max_len = {self.max_len} tokens; got {length}; "
                f"cut them, or give a larger max_len"
            )

    def compute_mask(self, inputs, previous_mask=None):
        return ops.not_equal(inputs, 0) if self.mask_zero else previous_mask

    def compute_output_shape(self, input_shape) -> tuple:
        return (*input_shape, self.embedding_dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "max_len": self.max_len,
            "vocab_size": self.vocab_size,
            "embedding_dim": self.embedding_dim,
            "with_positions": self.with_positions,
            "mask_zero": self.mask_zero,
        }


@keras.saving.register_keras_serializable(package="thrifty")
class Patches(keras.layers.Layer):
    """Cuts images into squares: [B, H, W, C] -> [B, (H // p) (W // p), p p C], p = patch_size.

    Patches from left to right and top to bottom, each as (row, column, channel); what is left at the right and the
    bottom is dropped. H and W may be None. Raises ThriftyError where patch_size is no positive integer, and where an
    image is smaller than a patch.
    """

    def __init__(self, patch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patch_size = positive("Patches", "patch_size", patch_size)
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def call(self, inputs):
        p = self.patch_size
        self.compute_output_shape(inputs.shape)  # refuses images that are too small
        batch, height, width, channels = ops.shape(inputs)
        rows, columns = height // p, width // p
        cut = inputs[:, : rows * p, : columns * p]
        cut = ops.reshape(cut, (batch, rows, p, columns, p, channels))
        return ops.reshape(ops.transpose(cut, (0, 1, 3, 2, 4, 5)), (batch, rows * columns, p * p * channels))

    def compute_output_shape(self, input_shape) -> tuple:
        batch, *sides, channels = input_shape
        if any(side is not None and side < self.patch_size for side in sides):
            raise ThriftyError(
                f"[Patches] an image must hold a patch of {self.patch_size} x {self.patch_size}; got {tuple(sides)}; "
                f"give a smaller patch_size"
            )
        rows, columns = (None if side is None else side // self.patch_size for side in sides)
        count = None if rows is None or columns is None else rows * columns
        return batch, count, None if channels is None else self.patch_size**2 * channels

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "patch_size": self.patch_size}


@keras.saving.register_keras_serializable(package="thrifty")
class PatchEmbedding(PackedParts, keras.layers.Layer):
    """y_i = W x_i + b (+ P[i] with with_positions), P [num_patches, embedding_dim], learned.

    [B, num_patches, d] -> [B, num_patches, embedding_dim]; W is ternary (`DenseMML`), or a plain `Dense` layer with
    use_mml=False. Without positions any number of patches will do, None included. Masks are passed on.

    Raises ThriftyError where a size is no positive integer, and where there are positions but not for the number of
    patches that comes in (which TensorFlow finds out for itself where it is None).
    """

    def __init__(
        self, num_patches: int, embedding_dim: int, use_mml: bool = True, with_positions: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_patches = positive("PatchEmbedding", "num_patches", num_patches)
        self.embedding_dim = positive("PatchEmbedding", "embedding_dim", embedding_dim)
        self.use_mml = use_mml
        self.with_positions = with_positions
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.supports_masking = True
        dense = DenseMML if use_mml else keras.layers.Dense
        self.projection = dense(embedding_dim, dtype=self.dtype_policy, name="projection")
        self.positions = _positions(num_patches, embedding_dim, self.dtype_policy) if with_positions else None

    def build(self, input_shape) -> None:
        self._check_count(input_shape[1])
        self.projection.build(input_shape)
        if self.positions is not None:
            self.positions.build((self.num_patches,))

    def call(self, inputs):
        self._check_count(inputs.shape[1])
        projected = self.projection(inputs)
        return projected if self.positions is None else projected + self.positions(ops.arange(self.num_patches))

    def _check_count(self, count: int | None) -> None:
        if self.with_positions and count not in (None, self.num_patches):
            raise ThriftyError(
                f"[PatchEmbedding] there are positions for num_patches = {self.num_patches}; got {count} patches; "
                f"give that number, or with_positions=False"
            )

    def compute_output_shape(self, input_shape) -> tuple:
        return (*input_shape[:-1], self.embedding_dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_patches": self.num_patches,
            "embedding_dim": self.embedding_dim,
            "use_mml": self.use_mml,
            "with_positions": self.with_positions,
        }


def _positions(count: int, embedding_dim: int, dtype: Any) -> keras.layers.Embedding:
    return keras.layers.Embedding(count, embedding_dim, dtype=dtype, name="positions")


@keras.saving.register_keras_serializable(package="thrifty")
class RotaryPositionalEmbedding(keras.layers.Layer):
    """(a, b) -> (a cos t - b sin t, b cos t + a sin t), a and b the halves of the features (arXiv 2104.09864).

    t_k = (position + offset) / scaling_factor · max_wavelength^(-2k / D), k = 0 ... D / 2 - 1, for D features along
    `feature_axis` and positions 0, 1, ... along `sequence_axis`; all other axes share them. Where D is odd, the last
    feature passes as it is, and D is one less. inputs: at least two axes, D known -> the same shape in the compute
    dtype; angles and products are float32 at least, whatever the dtype. Has no variables; passes masks.

    call(inputs, offset=0): offset, an integer or an integer tensor without axes (which may be traced), is the position
    of the first element: the number of positions already decoded.

    Raises ThriftyError where both axes are the same or one is not there, where the number of features is unknown, where
    offset is no integer, and where a Python integer leads below 0 or beyond 2^24 positions (the value of a tensor is
    not looked at).
    """

    def __init__(
        self,
        sequence_axis: int = 1,
        feature_axis: int = -1,
        max_wavelength: float = 10_000,
        scaling_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("max_wavelength", max_wavelength), ("scaling_factor", scaling_factor)):
            if not value > 0:
                raise ThriftyError(f"[RotaryPositionalEmbedding] {name} must be positive; got {value}; give more")
        self.sequence_axis = operator.index(sequence_axis)
        self.feature_axis = operator.index(feature_axis)
        self.max_wavelength = max_wavelength
        self.scaling_factor = scaling_factor
        self.supports_masking = True

    def build(self, input_shape) -> None:
        _, feature = self._axes(len(input_shape))
        features = input_shape[feature]
        if features is None:
            raise ThriftyError(
                f"[RotaryPositionalEmbedding] the number of features must be known; got {tuple(input_shape)}; give it "
                f"in keras.Input"
            )
        self.input_spec = keras.layers.InputSpec(axes={self.feature_axis: features})
        # Plain numbers, in a tuple: torch.compile takes neither numpy arrays nor Keras' tracked lists as constants.
        self._frequencies = tuple(rope_frequencies(features // 2 * 2, self.max_wavelength).tolist())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Keras would make tensors of numpy's integers, whose values are not looked at.
        return super().__call__(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    def call(self, inputs, offset=0):
        sequence, feature = self._axes(len(inputs.shape))
        length, half = ops.shape(inputs)[sequence], inputs.shape[feature] // 2
        angles = self._angles(length, offset)  # [S, D / 2]
        if sequence > feature:
            angles = ops.transpose(angles)
        sizes = [1] * len(inputs.shape)
        sizes[sequence], sizes[feature] = length, half
        exact = keras.backend.result_type(self.compute_dtype, "float32")
        cos, sin = (ops.cast(ops.reshape(table(angles), sizes), exact) for table in (ops.cos, ops.sin))
        x, before = ops.cast(inputs, exact), (slice(None),) * feature
        a, b, rest = (x[*before, part] for part in (slice(half), slice(half, 2 * half), slice(2 * half, None)))
        rotated = ops.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=feature)
        return ops.cast(rotated, self.compute_dtype)

    def compute_output_shape(self, input_shape) -> tuple:
        self._axes(len(input_shape))
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        axes = {"sequence_axis": self.sequence_axis, "feature_axis": self.feature_axis}
        scales = {"max_wavelength": self.max_wavelength, "scaling_factor": self.scaling_factor}
        return {**super().get_config(), **axes, **scales}

    def _axes(self, rank: int) -> tuple[int, int]:
        axes = (self.sequence_axis, self.feature_axis)
        if not all(-rank <= axis < rank for axis in axes) or axes[0] % rank == axes[1] % rank:
            raise ThriftyError(
                f"[RotaryPositionalEmbedding] sequence_axis and feature_axis must be two of the {rank} axes of the "
                f"input; got {axes[0]} and {axes[1]}; give two different ones"
            )
        return axes[0] % rank, axes[1] % rank

    def _angles(self, length, offset):
        _check_offset(offset, length)
        positions = ops.cast(ops.arange(length, dtype="int32") + ops.cast(offset, "int32"), "float32")
        frequencies = ops.convert_to_tensor(self._frequencies, "float32")
        return ops.expand_dims(positions / self.scaling_factor, -1) * frequencies


def _check_offset(offset: Any, length: Any) -> None:
    if isinstance(offset, int):
        last = offset + (length if isinstance(length, int) else 0)
        if offset < 0 or last > MAX_POSITIONS:
            raise ThriftyError(
                f"[RotaryPositionalEmbedding] positions must lie in 0 ... {MAX_POSITIONS - 1}, which float32 tells "
                f"apart; got offset={offset} and length {length}; give the number of positions decoded so far"
            )
    elif not keras.backend.is_int_dtype(getattr(offset, "dtype", float)) or len(offset.shape) > 0:
        raise ThriftyError(
            f"[RotaryPositionalEmbedding] offset must be one integer; got {offset}; give the first position"
        )
