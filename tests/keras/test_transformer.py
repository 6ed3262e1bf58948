"""The gated feed-forward layer."""

import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras.layers.transformer import FeedForwardGate


def test_known_values():
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


def test_masks_pass():
    embedded = keras.layers.Embedding(3, 6, mask_zero=True)(np.array([[1, 0]]))
    assert FeedForwardGate(4, 8)(embedded)._keras_mask is not None


@pytest.mark.parametrize("sizes", [(0, 3), (2, -1), (2.0, 3), (2, None)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ThriftyError, match=r"\[FeedForwardGate\] \w+ must be a positive integer; got"):
        FeedForwardGate(*sizes)
