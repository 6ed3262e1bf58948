"""Files of Keras-MML, made here by the description of their format, answer through our layers as its formulas say."""

import keras
import numpy as np
import pytest
from keras_mml_files import dense_groups, sequential, write_archive, write_weights

from thrifty.errors import ThriftyError, ThriftyWarning
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
    assert model.layers[0].packed_dense.weights.scale == np.float32(1) / np.float32(3.1415926)


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


def test_norms_and_embeddings_of_patches(tmp_path):
    kernel, gain, bias, table, last = codes(4, 8), floats(4), floats(8), floats(3, 8), floats(8)
    path = "layers/patch_embedding"
    groups = dense_groups(f"{path}/_projection", kernel, 2.5, np.tile(gain, (3, 1)), bias)
    groups[f"{path}/_position_embedding"] = {"0": table}
    groups["layers/rms_norm"] = {"0": np.tile(last, (3, 1))}
    arguments = {"num_patches": 3, "embedding_dim": 8, "with_positions": True}
    config = sequential([3, 4], ("PatchEmbedding", arguments), ("RMSNorm", {}))
    write_archive(tmp_path / "mml.keras", config, groups)
    x = floats(2, 3, 4)
    y = dense(x, kernel, 2.5, gain, bias) + table
    y = y / np.sqrt((y**2).mean(-1, keepdims=True)) * last
    np.testing.assert_allclose(load_keras_mml(tmp_path / "mml.keras").predict(x, verbose=0), y, rtol=1e-3, atol=1e-3)


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


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(x, f, c, g, out):
    """Keras-MML's recurrence over [B, T, units], whose gates were computed."""
    h, hs = np.zeros_like(f[:, 0]), []
    for t in range(f.shape[1]):
        h = f[:, t] * h + (1 - f[:, t]) * c[:, t]
        hs.append(out(g[:, t] * h))
    return np.stack(hs, 1)


def test_a_recurrent_layer_tells_its_parts_apart_by_shapes_and_names(tmp_path):
    d = units = 6  # so that both plain gates have the same shape
    kernel, gain, bias = codes(d, 2 * units), floats(d), floats(2 * units)
    data, output = (floats(d, units), floats(units)), (floats(units, units), floats(units))
    path = "layers/grumml/cell"
    groups = dense_groups(f"{path}/_gates", kernel, 2.5, gain, bias)
    groups[f"{path}/_output_gate"] = {"0": output[0], "1": output[1]}
    groups[f"{path}/_data_gate"] = {"0": data[0], "1": data[1]}
    arguments = {"units": units, "fully_mml": False, "num_heads": 2, "return_sequences": True, "cell": {}}
    write_archive(tmp_path / "mml.keras", sequential([7, d], ("GRUMML", arguments)), groups)
    x = floats(3, 7, d)
    f, c = np.split(dense(x, kernel, 2.5, gain, bias), 2, -1)
    y = gru(x, sigmoid(f), c * sigmoid(c), sigmoid(x @ data[0] + data[1]), lambda o: o @ output[0] + output[1])
    found = load_keras_mml(tmp_path / "mml.keras").predict(x, verbose=0)
    np.testing.assert_allclose(found, y, rtol=1e-3, atol=1e-3)


def test_real_and_imaginary_parts_of_lru(tmp_path):
    d, units, state = 5, 4, 6
    b = [(codes(d, state), floats(d)) for _ in range(2)]
    c, last = [floats(state, units) for _ in range(2)], floats(d, units)
    nu, theta, gamma = floats(state), floats(state), floats(state)
    path = "layers/lrumml/cell"
    groups = {path: {"0": nu, "1": theta, "2": gamma}}
    for name, (kernel, gain) in zip(("real", "imag"), b, strict=True):
        groups |= dense_groups(f"{path}/b_{name}", kernel, 1.5, gain)
    groups |= {f"{path}/c_real": {"0": c[0]}, f"{path}/c_imag": {"0": c[1]}, f"{path}/d": {"0": last}}
    config = sequential([9, d], ("LRUMML", {"units": units, "state_dim": state}))
    write_archive(tmp_path / "mml.keras", config, groups)
    x = floats(2, 9, d)
    bx = dense(x, b[0][0], 1.5, b[0][1], 0) + 1j * dense(x, b[1][0], 1.5, b[1][1], 0)
    h = np.zeros((2, state), complex)
    for t in range(9):
        h = np.exp(-np.exp(nu) + 1j * np.exp(theta)) * h + np.exp(gamma) * bx[:, t]
    y = (h @ (c[0] + 1j * c[1])).real + x[:, -1] @ last
    found = load_keras_mml(tmp_path / "mml.keras").predict(x, verbose=0)
    np.testing.assert_allclose(found, y, rtol=1e-3, atol=2e-3)


def block(path: str, norms: tuple[str, str], length: int = 3, width: int = 4):
    """The groups of a TransformerBlockMML of width 4, and what it answers."""
    tiled = lambda gain: np.tile(gain, (length, 1))  # noqa: E731
    parts = [
        (codes(width, 3 * width), floats(width), floats(3 * width)),
        (codes(width, width), floats(width), floats(width)),
    ]
    parts += [(codes(width, 10), floats(width), floats(10)), (codes(5, width), floats(5), floats(width))]
    gains = floats(width), floats(width)
    names = ("_attention/_gru/cell/_kernel", "_attention/_gru/cell/_output_gate", "_ffn/_hidden", "_ffn/_output")
    groups = {}
    for name, (kernel, gain, bias) in zip(names, parts, strict=True):
        rows = gain if "cell" in name else tiled(gain)
        groups |= dense_groups(f"{path}/{name}", kernel, 2.0, rows, bias)
    groups |= {f"{path}/{name}": {"0": tiled(gain)} for name, gain in zip(norms, gains, strict=True)}

    def answer(x):
        f, c, g = np.split(dense(x, parts[0][0], 2.0, *parts[0][1:]), 3, -1)
        mixed = gru(x, sigmoid(f), c * sigmoid(c), sigmoid(g), lambda o: dense(o, parts[1][0], 2.0, *parts[1][1:]))
        a = x + mixed
        a = a / np.sqrt((a**2).mean(-1, keepdims=True)) * gains[0]
        gate, up = np.split(dense(a, parts[2][0], 2.0, *parts[2][1:]), 2, -1)
        y = a + dense(gate * sigmoid(gate) * up, parts[3][0], 2.0, *parts[3][1:])
        return y / np.sqrt((y**2).mean(-1, keepdims=True)) * gains[1]

    return groups, answer


@pytest.mark.parametrize("norms", [("_attention_norm", "_feed_forward_norm"), ("_norm_1", "_norm_2")])
def test_a_block_warns_where_names_do_not_tell_its_norms_apart(tmp_path, norms):
    groups, answer = block("layers/transformer_block_mml", norms)
    arguments = {"embedding_dim": 4, "ffn_dim": 5, "num_heads": 2}
    write_archive(tmp_path / "mml.keras", sequential([3, 4], ("TransformerBlockMML", arguments)), groups)
    if norms[0] == "_norm_1":
        with pytest.warns(
            ThriftyWarning, match=r"_norm_1, .*_norm_2 were taken for .*attention_norm, .*feed_forward_norm"
        ):
            model = load_keras_mml(tmp_path / "mml.keras")
    else:
        model = load_keras_mml(tmp_path / "mml.keras")
    x = floats(2, 3, 4)
    np.testing.assert_allclose(model.predict(x, verbose=0), answer(x), rtol=0.01, atol=0.01)
