"""The ternary dense layer: what it computes, how it trains, and what files hold of it."""

import keras
import numpy as np
from keras import ops

from thrifty.keras import is_packed, pack
from thrifty.keras.layers import DenseMML

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def numpy(x) -> np.ndarray:
    return ops.convert_to_numpy(x)


def model(*layers: keras.layers.Layer, shape: tuple = (24,)) -> keras.Model:
    built = keras.Sequential([keras.Input(shape), *layers])
    built.compile("adam", "mse")
    return built


def test_train_save_load_train_pack_save_load_predict(tmp_path):
    x, y = array(64, 24), array(64, 3)
    trained = model(DenseMML(20, activation="relu"), DenseMML(17), keras.layers.Dense(3))
    trained.fit(x, y, epochs=1, verbose=0)
    trained.save(tmp_path / "float.keras")
    loaded = keras.saving.load_model(tmp_path / "float.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), trained.predict(x, verbose=0))
    before = [numpy(w) for w in loaded.trainable_variables]
    loaded.fit(x, y, epochs=1, verbose=0)
    assert all((numpy(w) != b).any() for w, b in zip(loaded.trainable_variables, before, strict=True))
    expected = loaded.predict(x, verbose=0)
    assert pack(loaded) is loaded
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=0, atol=1e-5)
    loaded.save(tmp_path / "packed.keras")
    packed = keras.saving.load_model(tmp_path / "packed.keras")
    assert is_packed(packed)
    np.testing.assert_array_equal(packed.predict(x, verbose=0), loaded.predict(x, verbose=0))
