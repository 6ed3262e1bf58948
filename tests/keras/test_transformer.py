import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras import pack
from thrifty.keras.layers import GRUMML, AttentionMML, FeedForwardGate, TokenEmbedding, TransformerBlockMML


def inputs(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("fully_mml", [True, False])
def test_attention_is_a_gru_of_all_steps(fully_mml):
    layer, gru = AttentionMML(2, 6, fully_mml), GRUMML(6, fully_mml, 2, return_sequences=True)
    x = inputs(2, 5, 4)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    layer.build(x.shape)
    gru.build(x.shape)
    gru.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(layer(x, mask=mask)), numpy(gru(x, mask=mask)))
    assert layer.compute_output_shape((None, None, 4)) == (None, None, 6)


def test_a_block_is_two_residual_steps_each_followed_by_its_norm():
    block = TransformerBlockMML(6, 8, 2)
    x = inputs(2, 5, 6)
    y = numpy(block(x, training=False))

    def norm(a):
        return a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-5)

    a = norm(x + numpy(block.attention(x)))
    np.testing.assert_allclose(y, norm(a + numpy(block.feed_forward(a))), rtol=1e-4, atol=1e-5)
    assert block.compute_output_shape((None, None, 6)) == (None, None, 6)
    dropped = numpy(TransformerBlockMML(6, 8, 2, rate=0.9)(x, training=True))
    assert np.abs(dropped - x).max() > 0


def test_the_past_does_not_see_the_future():
    block = TransformerBlockMML(6, 8, 3)
    x = inputs(2, 5, 6)
    before = numpy(block(x))
    x[:, 3] += 1
    after = numpy(block(x))
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert (after[:, 3:] != before[:, 3:]).any(-1).all()


def test_what_is_refused():
    with pytest.raises(ThriftyError, match=r"\[AttentionMML\] .*`num_heads`"):
        AttentionMML(0, 4)
    with pytest.raises(ThriftyError, match=r"\[AttentionMML\] out_dim must be a multiple of num_heads = 3; got 4"):
        AttentionMML(3, 4)
    for i in range(3):
        with pytest.raises(ThriftyError, match=r"\[TransformerBlockMML\] .*positive integer, got 0"):
            TransformerBlockMML(*(0 if i == j else 4 for j in range(3)))
    with pytest.raises(ThriftyError, match="embedding_dim must be a multiple of num_heads = 3; got 4"):
        TransformerBlockMML(4, 4, 3)
    for rate in (-0.1, 1):
        with pytest.raises(ThriftyError, match=r"rate must be in \[0, 1\); got"):
            TransformerBlockMML(4, 4, 2, rate=rate)
    with pytest.raises(ThriftyError, match=r"inputs must have embedding_dim = 4 features, .* got 5"):
        TransformerBlockMML(4, 4, 2)(keras.Input((None, 5)))


def test_a_text_model_trains_is_saved_packed_and_saved_again(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (8, 6))
    tokens[:4, 4:] = 0
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            TokenEmbedding(8, 9, 6, mask_zero=True),
            TransformerBlockMML(6, 8, 2),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.get_weights()
    model.fit(tokens, rng.integers(0, 2, 8), verbose=0)
    assert all((old != new).any() for old, new in zip(before, model.get_weights(), strict=True))
    for stage in ("trained.keras", "packed.keras"):
        expected = model.predict(tokens, verbose=0)
        # The mean of what the block gives is over the words alone, if it passed the mask on.
        np.testing.assert_allclose(numpy(model(tokens[:4, :4])), expected[:4], rtol=1e-4, atol=1e-5)
        model.save(tmp_path / stage)
        loaded = keras.saving.load_model(tmp_path / stage)
        assert loaded.layers[1].get_config() == model.layers[1].get_config()
        np.testing.assert_array_equal(loaded.predict(tokens, verbose=0), expected)
        if stage == "trained.keras":
            pack(model)


def test_half_precision():
    y = TransformerBlockMML(6, 8, 2, dtype="mixed_bfloat16")(inputs(2, 5, 6))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert np.isfinite(numpy(ops.cast(y, "float32"))).all()


def test_known_values_of_the_gate():
    layer = FeedForwardGate(2, 3)
    layer.build((None, 2))
    layer.set_weights([np.ones(w.shape) for w in layer.get_weights()])
    y = ops.convert_to_numpy(layer(np.array([[1.0, 1.0], [2.0, 2.0]], np.float32)))
    np.testing.assert_allclose(y, [[11.726998] * 2, [47.998482] * 2], rtol=1e-6)


def test_the_output_is_as_wide_as_asked_for(tmp_path):
    x = keras.Input((None, 5))
    y = FeedForwardGate(input_dim=256, hidden_dim=1024)(x)
    assert y.shape == (None, None, 256)
    model = keras.Model(x, y)
    assert [w.shape for w in model.weights] == [(5, 1024), (5, 1024), (1024, 256)]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    data = np.ones((2, 3, 5), np.float32)
    np.testing.assert_array_equal(*(ops.convert_to_numpy(one(data)) for one in (model, loaded)))


def test_masks_pass_the_gate():
    embedded = keras.layers.Embedding(3, 6, mask_zero=True)(np.array([[1, 0]]))
    assert FeedForwardGate(4, 8)(embedded)._keras_mask is not None


@pytest.mark.parametrize("sizes", [(0, 3), (2, -1), (2.0, 3), (2, None)])
def test_sizes_of_the_gate_are_checked(sizes):
    with pytest.raises(ThriftyError, match=r"\[FeedForwardGate\] \w+ must be a positive integer; got"):
        FeedForwardGate(*sizes)
