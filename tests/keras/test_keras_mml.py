"""Files of Keras-MML, made here by the description of their format, answer through our layers as its formulas say."""

import keras
import numpy as np
import pytest
from keras_mml_files import dense_groups, sequential, write_archive, write_weights

from thrifty.errors import ThriftyError
from thrifty.keras import is_packed, layers, unpack
from thrifty.keras.keras_mml import load_keras_mml

rng = np.random.default_rng(7)


def codes(d: int, units: int) -> np.ndarray:
    return rng.choice([-1, 0, 1], p=[0.3, 0.35, 0.35], size=(d, units))


def floats(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def dense(x, kernel, g, gain, bias):
    """Keras-MML's formula before the activation, in float64."""
    x = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True)) * gain
    scale = 127 / np.abs(x).max(-1, keepdims=True)
    return (np.round(x * scale) / scale) @ kernel / g + bias


def two_layers(path, gain, input_shape=(6,)):
    """An archive of DenseMML(16, relu) and Dense(3), its arrays, and what it answers."""
    kernel, g, bias, head, offset = codes(6, 16), 3.1415926, floats(16), floats(16, 3), floats(3)
    groups = dense_groups("layers/dense_mml", kernel, g, gain, bias)
    groups["layers/dense"] = {"0": head, "1": offset}
    groups["optimizer"] = {"0": np.int64(17), "1": np.float32(1e-3)}
    config = sequential(list(input_shape), ("DenseMML", {"units": 16, "activation": "relu"}), ("Dense", {"units": 3}))
    write_archive(path, config, groups)
    return lambda x: np.maximum(dense(x, kernel, g, gain, bias), 0) @ head + offset


def test_an_archive_answers_as_it_did_and_keeps_its_scale(tmp_path):
    answer = two_layers(tmp_path / "mml.keras", floats(6))
    model = load_keras_mml(tmp_path / "mml.keras")
    x = floats(50, 6)
    np.testing.assert_allclose(model.predict(x, verbose=0), answer(x), rtol=1e-4, atol=1e-4)
    assert is_packed(model)
    assert model.layers[0].packed_dense.scale == np.float32(1) / np.float32(3.1415926)


def test_it_saves_and_loads_to_the_same_bits_and_trains_when_unpacked(tmp_path):
    two_layers(tmp_path / "mml.keras", floats(6))
    model = load_keras_mml(str(tmp_path / "mml.keras"))
    x = floats(20, 6)
    before = model.predict(x, verbose=0)
    model.save(tmp_path / "ours.keras")
    again = keras.saving.load_model(tmp_path / "ours.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), before)
    unpack(again)
    # The float kernel's scale is the nearest that bfloat16 holds.
    np.testing.assert_allclose(again.predict(x, verbose=0), before, rtol=0.02, atol=0.02)
    again.compile("adam", "mse")
    kernel = keras.ops.convert_to_numpy(again.layers[0].kernel)
    again.fit(x, before, epochs=1, verbose=0)
    assert (keras.ops.convert_to_numpy(again.layers[0].kernel) != kernel).any()


def test_a_gain_that_is_equal_at_every_position_is_read_for_every_length(tmp_path):
    gain = floats(6)
    answer = two_layers(tmp_path / "mml.keras", np.tile(gain, (5, 1)), (5, 6))
    x = floats(4, 5, 6)
    found = load_keras_mml(tmp_path / "mml.keras").predict(x, verbose=0)
    np.testing.assert_allclose(found, answer(x), rtol=1e-4, atol=1e-4)


def test_a_gain_that_differs_over_positions_is_refused(tmp_path):
    two_layers(tmp_path / "mml.keras", floats(5, 6), (5, 6))
    with pytest.raises(ThriftyError, match=r"\[load_keras_mml\] .*'layers/dense_mml' differs over the 5 .*train"):
        load_keras_mml(tmp_path / "mml.keras")


def test_layers_of_one_class_are_numbered(tmp_path):
    kernels, gains = [codes(4, 4) for _ in range(3)], [floats(4) for _ in range(3)]
    groups, arguments = {}, {"units": 4, "use_bias": False}
    for name, kernel, gain in zip(("dense_mml", "dense_mml_1", "dense_mml_2"), kernels, gains, strict=True):
        groups |= dense_groups(f"layers/{name}", kernel, 2.0, gain)
    write_archive(tmp_path / "mml.keras", sequential([4], *[("DenseMML", arguments)] * 3), groups)
    x = floats(9, 4)
    found = load_keras_mml(tmp_path / "mml.keras").predict(x, verbose=0)
    for kernel, gain in zip(kernels, gains, strict=True):
        x = dense(x, kernel, 2.0, gain, 0)
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-3)


def test_weights_are_read_into_a_model(tmp_path):
    kernel, gain, bias = codes(5, 8), floats(5), floats(8)
    write_weights(tmp_path / "mml.weights.h5", dense_groups("layers/dense_mml", kernel, 1.5, gain, bias))
    model = keras.Sequential([keras.Input((5,)), layers.DenseMML(8)])
    x = floats(3, 5)
    model.predict(x, verbose=0)
    load_keras_mml(tmp_path / "mml.weights.h5", model)
    np.testing.assert_allclose(model.predict(x, verbose=0), dense(x, kernel, 1.5, gain, bias), rtol=1e-4, atol=1e-4)
    with pytest.raises(ThriftyError, match="weights need a model"):
        load_keras_mml(tmp_path / "mml.weights.h5")
    wider = keras.Sequential([keras.Input((5,)), layers.DenseMML(9)])
    with pytest.raises(ThriftyError, match=r"layers of the model; 'layers/dense_mml' wants .* build it"):
        load_keras_mml(tmp_path / "mml.weights.h5", wider)
    assert not is_packed(wider)
    fewer = keras.Sequential([keras.Input((5,)), keras.layers.ReLU()])
    with pytest.raises(ThriftyError, match="'layers/dense_mml' wants no others and is given layers/dense_mml"):
        load_keras_mml(tmp_path / "mml.weights.h5", fewer)


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "norm"])
def test_damaged_kernels_name_their_layer(tmp_path, damage):
    groups = dense_groups("layers/dense_mml", codes(40, 8), 2.0, floats(40))
    own = groups["layers/dense_mml"]
    if damage == "cut":
        own["kernel_encoded"] = own["kernel_encoded"][:-3]
    elif damage == "empty":
        own["kernel_encoded"] = np.empty(0, np.uint8)
    elif damage == "shape":
        del own["kernel_shape"]
    else:
        del groups["layers/dense_mml/_activation_norm"]
    config = sequential([40], ("DenseMML", {"units": 8, "use_bias": False}))
    write_archive(tmp_path / "mml.keras", config, groups)
    with pytest.raises(ThriftyError, match=r"^\[load_keras_mml\] .*'layers/dense_mml'"):
        load_keras_mml(tmp_path / "mml.keras")


def test_files_that_are_not_of_keras_mml(tmp_path):
    with pytest.raises(ThriftyError, match="the file must exist"):
        load_keras_mml(tmp_path / "absent.keras")
    write_archive(tmp_path / "plain.keras", sequential([4], ("Dense", {"units": 2})), {})
    with pytest.raises(ThriftyError, match=r"has none; use keras.saving.load_model"):
        load_keras_mml(tmp_path / "plain.keras")
    write_archive(tmp_path / "other.keras", sequential([4], ("Unheard", {"units": 2})), {})
    with pytest.raises(ThriftyError, match=r"must be one of .*DenseMML.*; got Unheard"):
        load_keras_mml(tmp_path / "other.keras")
    (tmp_path / "text.weights.h5").write_text("no HDF5")
    with pytest.raises(ThriftyError, match="weights are an HDF5 file"):
        load_keras_mml(tmp_path / "text.weights.h5", keras.Sequential([keras.Input((2,)), layers.DenseMML(2)]))
    with pytest.raises(ThriftyError, match="a model must be built"):
        load_keras_mml(tmp_path / "text.weights.h5", keras.Sequential([layers.DenseMML(2)]))
    (tmp_path / "text.keras").write_text("no zip")
    with pytest.raises(ThriftyError, match=r"a \.keras file is a zip"):
        load_keras_mml(tmp_path / "text.keras")
