import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras import pack
from thrifty.keras.layers import GLUMML, BilinearMML, GeGLUMML, ReGLUMML, SeGLUMML, SwiGLUMML

VARIANTS = {BilinearMML: "linear", GeGLUMML: "gelu", ReGLUMML: "relu", SeGLUMML: "selu", SwiGLUMML: "silu"}


def inputs(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def hidden_size(layer):
    return layer.down.gain.shape[0]


@pytest.mark.parametrize(("features", "size"), [(3, 256), (96, 256), (97, 512), (256, 768), (512, 1536)])
def test_the_intermediate_size_is_rounded_up_to_256(features, size):
    layer = GLUMML(5)
    layer.build((None, features))
    assert hidden_size(layer) == size
    small = GLUMML(5, hidden_ratio=1, intermediate_size=7)
    small.build((None, features))
    assert hidden_size(small) == 7


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_glu_with_its_activation(variant):
    general, layer = GLUMML(5, intermediate_size=8, activation=VARIANTS[variant]), variant(5, intermediate_size=8)
    x = inputs(2, 3, 4)
    expected = general(x)
    layer.build(x.shape)
    layer.set_weights(general.get_weights())
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), ops.convert_to_numpy(expected))
    assert layer.compute_output_shape((None, None, 4)) == (None, None, 5)
    with pytest.raises(ThriftyError, match=rf"\[{variant.__name__}\] its activation is {VARIANTS[variant]}; got"):
        variant(5, activation="relu")


def test_what_is_refused():
    for name, options in {
        r"`units`, .* got 0": {"units": 0},
        r"`intermediate_size`, .* got -1": {"units": 1, "intermediate_size": -1},
        r"\[GLUMML\] hidden_ratio must be positive; got 0": {"units": 1, "hidden_ratio": 0},
        r"activation must be one of sigmoid, .* got 'tanh'": {"units": 1, "activation": "tanh"},
        r"activation must be one of .* got None": {"units": 1, "activation": None},
    }.items():
        with pytest.raises(ThriftyError, match=name):
            GLUMML(**options)


def test_it_trains_is_saved_and_packed(tmp_path):
    x, y = inputs(8, 6, 4), inputs(8, 6, 2)
    model = keras.Sequential(
        [keras.Input((None, 4)), keras.layers.Masking(), SwiGLUMML(6, intermediate_size=9), keras.layers.Dense(2)]
    )
    model.compile("adam", "mse")
    before = model.get_weights()
    model.fit(x, y, verbose=0)
    assert all((old != new).any() for old, new in zip(before, model.get_weights(), strict=True))
    layer = model.layers[1]
    for stage in ("trained.keras", "packed.keras"):
        expected = model.predict(x, verbose=0)
        model.save(tmp_path / stage)
        loaded = keras.saving.load_model(tmp_path / stage)
        assert loaded.layers[1].get_config() == layer.get_config()
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
        if stage == "trained.keras":
            pack(model)
            np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-4)


def test_masks_and_half_precision_pass_through():
    x = inputs(2, 3, 4)
    masked = keras.layers.Masking()(np.concatenate([x, np.zeros((2, 2, 4), np.float32)], 1))
    layer = GeGLUMML(5, intermediate_size=8, dtype="mixed_bfloat16")
    y = layer(masked)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    np.testing.assert_array_equal(ops.convert_to_numpy(y._keras_mask), [[1, 1, 1, 0, 0]] * 2)
