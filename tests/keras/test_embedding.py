"""Tokens, patches, and rotary positions along any axis, from any position on."""

import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras import pack
from thrifty.keras.layers.embedding import PatchEmbedding, Patches, RotaryPositionalEmbedding, TokenEmbedding

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def rotated(x: np.ndarray, **options) -> np.ndarray:
    offset = options.pop("offset", 0)
    return ops.convert_to_numpy(RotaryPositionalEmbedding(**options)(x, offset=offset))


ONES = [
    (
        (1, 4, 6),
        {},
        [
            [1, 1, 1, 1, 1, 1],
            [-0.30116868, 0.95252377, 0.99784327, 1.3817732, 1.0453222, 1.0021521],
            [-1.3254442, 0.9029957, 0.9956818, 0.4931506, 1.0883927, 1.0042995],
            [-1.1311125, 0.85152256, 0.9935159, -0.8488725, 1.1291188, 1.0064424],
        ],
    ),
    (
        (2, 3, 4),
        {"offset": 2},
        [
            [-1.325444, 0.979801, 0.493151, 1.019799],
            [-1.131113, 0.969555, -0.848872, 1.029546],
            [0.103159, 0.959211, -1.410446, 1.039189],
        ],
    ),
    (
        (3, 2, 4),
        {"scaling_factor": 2, "sequence_axis": 0},
        [
            [[1, 1, 1, 1]] * 2,
            [[0.398157, 0.9949875, 1.3570081, 1.0049875]] * 2,
            [[-0.3011686, 0.9899502, 1.3817732, 1.0099498]] * 2,
        ],
    ),
]


@pytest.mark.parametrize(("shape", "options", "expected"), ONES)
def test_known_values(shape, options, expected):
    y = rotated(np.ones(shape, np.float32), **options)
    np.testing.assert_allclose(y, np.broadcast_to(expected, shape), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("sequence_axis", "feature_axis"), [(1, 3), (2, 1), (3, 2), (-1, 0), (0, -2)])
def test_any_axes(sequence_axis, feature_axis):
    x = array(2, 6, 4, 8)
    moved = np.moveaxis(x, (sequence_axis, feature_axis), (1, 3))
    y = rotated(x, sequence_axis=sequence_axis, feature_axis=feature_axis, offset=3)
    expected = np.moveaxis(rotated(moved, offset=3), (1, 3), (sequence_axis, feature_axis))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)


def test_an_odd_last_feature_passes():
    x = array(2, 3, 5)
    y = rotated(x, offset=2)
    np.testing.assert_array_equal(y[..., 4], x[..., 4])
    np.testing.assert_array_equal(y[..., :4], rotated(x[..., :4], offset=2))
    np.testing.assert_array_equal(rotated(x[..., :1]), x[..., :1])


def test_an_offset_goes_on_where_the_last_call_ended():
    x = array(2, 9, 3, 8)
    whole = rotated(x)
    for offset in (4, np.array(4), ops.convert_to_tensor(4), ops.convert_to_tensor(np.int64(4))):
        np.testing.assert_array_equal(rotated(x[:, 4:], offset=offset), whole[:, 4:])


def test_positions_are_exact_in_low_precision():
    x = np.ones((1, 1, 64), np.float32)
    far = rotated(x, offset=4097, dtype="mixed_bfloat16").astype(np.float32)
    np.testing.assert_allclose(far, rotated(x, offset=4097), rtol=0, atol=1e-2)
    if keras.config.backend() != "jax":  # has no float64 unless told so before anything else
        assert rotated(np.ones((1, 3, 4)), dtype="float64").dtype == np.float64


def test_unknown_batch_and_length():
    x = keras.Input((None, 6))
    offset = keras.Input(batch_shape=(), dtype="int32")
    y = RotaryPositionalEmbedding()(x, offset=offset)
    assert y.shape == (None, None, 6)
    model = keras.Model([x, offset], y)
    for length in (1, 5):
        data = array(2, length, 6)
        out = ops.convert_to_numpy(model([ops.convert_to_tensor(data), ops.convert_to_tensor(7)]))
        np.testing.assert_allclose(out, rotated(data, offset=7), rtol=0, atol=1e-6)


def test_a_traced_offset(traced):
    x, layer = ops.convert_to_tensor(array(2, 3, 6)), RotaryPositionalEmbedding()
    expected = ops.convert_to_numpy(layer(x, offset=7))
    step = traced(lambda x, offset: layer(x, offset=offset))
    np.testing.assert_allclose(ops.convert_to_numpy(step(x, ops.convert_to_tensor(7))), expected, rtol=0, atol=1e-6)


def test_config_and_masks():
    layer = RotaryPositionalEmbedding(sequence_axis=2, feature_axis=1, max_wavelength=500.0, scaling_factor=4.0)
    again = RotaryPositionalEmbedding.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    np.testing.assert_array_equal(*(ops.convert_to_numpy(one(np.ones((1, 6, 3)))) for one in (layer, again)))
    embedded = keras.layers.Embedding(3, 6, mask_zero=True)(np.array([[1, 0]]))
    assert RotaryPositionalEmbedding()(embedded)._keras_mask is not None


@pytest.mark.parametrize(
    ("options", "offset", "message"),
    [
        ({}, -1, r"positions must lie in 0 ... 16777215.*got offset=-1 and length 3"),
        ({}, 2**24 - 2, r"positions must lie in .*got offset=16777214"),
        ({}, 2**40, r"positions must lie in"),
        ({}, np.int64(2**33), r"positions must lie in"),
        ({}, 1.5, r"offset must be one integer; got 1.5"),
        ({}, np.array([1, 2]), r"offset must be one integer"),
        ({"feature_axis": 1}, 0, r"sequence_axis and feature_axis must be two of the 3 axes.*got 1 and 1"),
        ({"feature_axis": -2}, 0, r".*must be two of the 3 axes"),
        ({"sequence_axis": 3}, 0, r".*must be two of the 3 axes.*got 3 and -1"),
        ({"scaling_factor": 0}, 0, r"scaling_factor must be positive; got 0"),
        ({"max_wavelength": -1}, 0, r"max_wavelength must be positive; got -1"),
    ],
)
def test_what_does_not_fit_is_refused(options, offset, message):
    with pytest.raises(ThriftyError, match=r"\[RotaryPositionalEmbedding\] " + message):
        rotated(np.ones((2, 3, 4), np.float32), offset=offset, **options)


def test_the_number_of_features_must_be_known():
    with pytest.raises(ThriftyError, match="number of features must be known"):
        RotaryPositionalEmbedding()(keras.Input((4, None)))


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("with_positions", [True, False])
def test_a_token_is_a_row_of_a_table_plus_its_position(with_positions):
    layer = TokenEmbedding(4, 9, 3, with_positions=with_positions)
    tokens = np.array([[1, 8, 0], [2, 2, 2]])
    y = numpy(layer(tokens))
    expected = numpy(layer.tokens.embeddings)[tokens]
    if with_positions:
        expected = expected + numpy(layer.positions.embeddings)[:3]
    np.testing.assert_allclose(y, expected, atol=1e-6)
    assert layer.compute_output_shape((None, None)) == (None, None, 3)
    with pytest.raises(ThriftyError, match=r"\[TokenEmbedding\] sequences must have at most max_len = 4 tokens; got 5"):
        layer(np.zeros((2, 5), np.int32))
    with pytest.raises(ThriftyError, match="got 6"):
        TokenEmbedding(4, 9, 3)(keras.Input((6,), dtype="int32"))


def test_padding_is_a_mask():
    tokens = np.array([[1, 0, 3], [0, 0, 2]])
    masked = TokenEmbedding(4, 9, 3, mask_zero=True)(tokens)
    np.testing.assert_array_equal(numpy(masked._keras_mask), tokens != 0)
    assert getattr(TokenEmbedding(4, 9, 3)(tokens), "_keras_mask", None) is None


def test_patches_go_from_left_to_right_and_top_to_bottom():
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(numpy(Patches(2)(image))[0], expected)
    colours = np.arange(2 * 15 * 9 * 3, dtype=np.float32).reshape(2, 15, 9, 3)
    y = numpy(Patches(4)(colours))
    assert y.shape == (2, 6, 48)
    np.testing.assert_array_equal(y[1, 3], colours[1, 4:8, 4:8].ravel())
    assert Patches(4).compute_output_shape((None, 15, None, 3)) == (None, None, 48)
    with pytest.raises(ThriftyError, match=r"\[Patches\] an image must hold a patch of 4 x 4; got \(3, 9\)"):
        Patches(4)(keras.Input((3, 9, 1)))


@pytest.mark.parametrize("use_mml", [True, False])
def test_patches_are_projected_and_placed(use_mml):
    layer = PatchEmbedding(5, 4, use_mml=use_mml, with_positions=True)
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    y = numpy(layer(x))
    np.testing.assert_allclose(y, numpy(layer.projection(x)) + numpy(layer.positions.embeddings), rtol=1e-6, atol=1e-6)
    with pytest.raises(ThriftyError, match=r"\[PatchEmbedding\] there are positions for num_patches = 5; got 4"):
        layer(x[:, :4])
    assert PatchEmbedding(5, 4).compute_output_shape((None, None, 6)) == (None, None, 4)
    assert numpy(PatchEmbedding(5, 4, use_mml=use_mml)(x[:, :2])).shape == (2, 2, 4)


@pytest.mark.parametrize(
    ("layer", "sizes"), [(TokenEmbedding, (4, 9, 3)), (PatchEmbedding, (5, 4)), (Patches, (2,))], ids=str
)
def test_sizes_are_positive_integers(layer, sizes):
    for i in range(len(sizes)):
        with pytest.raises(ThriftyError, match=rf"\[{layer.__name__}\] .* positive integer, got 0"):
            layer(*sizes[:i], 0, *sizes[i + 1 :])


def test_images_of_any_size_train_and_are_saved_and_packed(tmp_path):
    rng = np.random.default_rng(1)
    images, labels = rng.standard_normal((8, 6, 6, 2)).astype(np.float32), rng.integers(0, 3, 8)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            Patches(2),
            PatchEmbedding(9, 5, with_positions=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.get_weights()
    model.fit(images, labels, verbose=0)
    assert all((old != new).any() for old, new in zip(before, model.get_weights(), strict=True))
    pack(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [layer.get_config() for layer in loaded.layers] == [layer.get_config() for layer in model.layers]
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
    anywhere = keras.Sequential([keras.Input((None, None, 2)), Patches(2), model.layers[1].projection])
    assert anywhere.predict(images[:, :5, :4], verbose=0).shape == (8, 4, 5)


def test_texts_of_any_length_are_saved(tmp_path):
    model = keras.Sequential([keras.Input((None,), dtype="int32"), TokenEmbedding(7, 9, 4, True, mask_zero=True)])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for length in (3, 7):
        tokens = np.arange(length)[None]
        np.testing.assert_array_equal(loaded.predict(tokens, verbose=0), model.predict(tokens, verbose=0))
    half = TokenEmbedding(7, 300, 4, True, dtype="mixed_bfloat16")
    tokens = np.array([[299, 257]])  # bfloat16 would round these to others
    assert keras.backend.standardize_dtype(half(tokens).dtype) == "bfloat16"
    table, places = numpy(half.tokens.embeddings), numpy(half.positions.embeddings)
    np.testing.assert_allclose(numpy(ops.cast(half(tokens), "float32")), table[tokens] + places[:2], atol=2e-3)


def test_an_image_holds_a_patch():
    with pytest.raises(ThriftyError, match=r"must hold a patch of 4 x 4; got \(3, 5\)"):
        Patches(4)(np.zeros((2, 3, 5, 1), np.float32))
