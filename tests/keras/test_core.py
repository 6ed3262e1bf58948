"""The ternary dense layer: how it trains, what files hold of it, and what it refuses."""

import gc
import os
import subprocess
import sys
import weakref
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from thrifty import ThriftyError
from thrifty.keras import is_packed, pack, unpack
from thrifty.keras.layers import DenseMML, RMSNorm
from thrifty.keras.layers.core import PackedParts

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def numpy(x) -> np.ndarray:
    return ops.convert_to_numpy(x)


def model(*layers: keras.layers.Layer, shape: tuple = (24,)) -> keras.Model:
    built = keras.Sequential([keras.Input(shape), *layers])
    built.compile("adam", "mse")
    return built


def layer(features: int = 12, units: int = 7, **options) -> DenseMML:
    made = DenseMML(units, **options)
    made.build((None, features))
    return made


def gradients(function, *variables) -> list[np.ndarray]:
    """Gradients of a scalar function by variables, as each backend takes them."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = function()
        return [numpy(g) for g in tape.gradient(loss, [v.value for v in variables])]
    if backend == "torch":
        function().backward()
        return [numpy(v.value.grad) for v in variables]
    import jax

    def loss(values):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return function()

    return [numpy(g) for g in jax.grad(loss)([v.value for v in variables])]


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
    packed.save(tmp_path / "again.keras")
    weights = [zipfile.ZipFile(tmp_path / f"{name}.keras").read("model.weights.h5") for name in ("packed", "again")]
    assert weights[0] == weights[1]


def test_a_packed_model_trains_what_is_not_packed_and_all_of_it_when_unpacked():
    x, y = array(64, 24), array(64, 3)
    trained = model(DenseMML(20), keras.layers.Dense(3))
    trained.fit(x, y, verbose=0)
    pack(trained)
    codes = trained.layers[0].packed_dense.store()
    head = numpy(trained.layers[1].kernel)
    trained.fit(x, y, verbose=0)
    assert (numpy(trained.layers[1].kernel) != head).any()
    expected = trained.predict(x, verbose=0)
    unpack(trained)
    np.testing.assert_allclose(trained.predict(x, verbose=0), expected, rtol=0, atol=1e-5)
    pack(trained)
    for name, value in trained.layers[0].packed_dense.store().items():
        np.testing.assert_array_equal(value, codes[name])
    unpack(trained)
    kernel = numpy(trained.layers[0].kernel)
    trained.fit(x, y, verbose=0)
    assert (numpy(trained.layers[0].kernel) != kernel).any()


def test_packing_lets_go_of_float_kernels_and_keeps_the_count_of_steps():
    x, y = array(32, 24), array(32, 3)
    trained = model(DenseMML(20), keras.layers.Dense(3))
    trained.fit(x, y, verbose=0)
    kernel = weakref.ref(trained.layers[0].kernel)
    steps = int(trained.optimizer.iterations)
    assert steps
    pack(trained)
    gc.collect()
    assert kernel() is None
    assert int(trained.optimizer.iterations) == steps
    optimizer = trained.optimizer
    pack(trained)  # nothing left to do
    assert trained.optimizer is optimizer


def test_models_inside_and_around_follow(tmp_path):
    x = array(8, 24)
    inner = model(DenseMML(20))
    outer = model(inner)
    for each in (inner, outer):
        each.predict(x, verbose=0)
    pack(outer)
    for sign in (1, -1):
        unpack(outer)
        inner.layers[0].kernel.assign(sign * numpy(inner.layers[0].kernel))
        pack(outer)
        for each in (inner, outer):
            np.testing.assert_allclose(each.predict(x, verbose=0), numpy(inner.layers[0](x)), rtol=0, atol=1e-6)


def test_a_packed_layer_keeps_what_was_frozen_and_refuses_what_is_not_finite():
    frozen = layer()
    frozen.gain.trainable = False
    frozen.pack()
    frozen.unpack()
    assert [v.trainable for v in (frozen.kernel, frozen.bias, frozen.gain)] == [True, True, False]
    frozen.kernel.assign(np.full((12, 7), np.nan))
    with pytest.raises(ThriftyError, match="must be finite to be packed"):
        frozen.pack()
    assert not frozen.packed
    assert frozen.kernel is not None


def test_pack_takes_what_where_accepts():
    some = model(DenseMML(20, name="one"), DenseMML(20, name="two"))
    pack(some, where=lambda layer: layer.name == "two")
    assert [layer.packed for layer in some.layers] == [False, True]


def test_packed_weights_load_into_a_packed_and_into_a_trainable_model(tmp_path):
    x = array(8, 24)
    source = pack(model(DenseMML(20, bias_initializer="random_normal")))
    source.save_weights(tmp_path / "packed.weights.h5")
    packed, trainable = pack(model(DenseMML(20))), model(DenseMML(20))
    packed.predict(x, verbose=0)  # what is compiled must see the new weights
    for target in (packed, trainable):
        target.load_weights(tmp_path / "packed.weights.h5")
        np.testing.assert_allclose(target.predict(x, verbose=0), source.predict(x, verbose=0), rtol=0, atol=1e-5)
    assert not is_packed(trainable)
    pack(trainable)
    np.testing.assert_array_equal(trainable.predict(x, verbose=0), source.predict(x, verbose=0))


def test_a_file_holds_base3_bytes_and_little_else(tmp_path):
    pack(model(DenseMML(500, use_bias=False), shape=(300,))).save_weights(tmp_path / "packed.weights.h5")
    with h5py.File(tmp_path / "packed.weights.h5") as file:
        stored = file["layers/dense_mml/vars"]
        assert set(stored) == {"kernel_version", "kernel_shape", "kernel_scale", "kernel_packed", "gain"}
        assert 8 * stored["kernel_packed"].nbytes <= 1.61 * 300 * 500
    assert (tmp_path / "packed.weights.h5").stat().st_size < 300 * 500 / 5 + 4 * 300 + 16 * 1024


def test_packed_product_in_compiled_functions(traced):
    x, dense = array(2, 3, 12), layer()
    expected = dense(x)
    dense.pack()
    compiled = traced(lambda x: dense(x))
    for rows in (x, x[:1]):
        y = numpy(compiled(ops.convert_to_tensor(rows)))
        np.testing.assert_allclose(y, numpy(expected)[: len(rows)], rtol=0, atol=1e-5)


def test_gradients_go_straight_through():
    x, g, dense = array(5, 12), array(5, 7), layer(norm=False)
    upstream = ops.convert_to_tensor(g)
    kernel = numpy(dense.kernel)
    found = gradients(lambda: ops.sum(dense(x) * upstream), dense.kernel, dense.bias)
    scale = np.abs(x).max(1, keepdims=True) / 127
    x_q = np.rint(x / scale) * scale
    np.testing.assert_allclose(found[0], x_q.T @ g, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], g.sum(0), rtol=0, atol=1e-5)
    legacy = layer(norm=False, scale_gradient=True)
    legacy.kernel.assign(kernel)
    mean = np.abs(kernel).mean()
    codes = np.clip(np.rint(kernel / mean), -1, 1)
    expected = mean * (x_q.T @ g) + np.sign(kernel) / kernel.size * (g * (x_q @ codes)).sum()
    found = gradients(lambda: ops.sum(legacy(x) * upstream), legacy.kernel)[0]
    # s is rounded to bfloat16, 8 bits.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-8 * np.abs(expected).max())


def test_rows_of_zeros_give_the_bias_and_finite_gradients():
    dense = layer(bias_initializer="random_normal")
    x = np.zeros((3, 12), np.float32)
    np.testing.assert_array_equal(numpy(dense(x)), np.tile(numpy(dense.bias), (3, 1)))
    assert all(np.isfinite(g).all() for g in gradients(lambda: ops.sum(dense(x)), *dense.trainable_variables))


def test_any_length_any_rank_and_masks():
    inputs = keras.Input((None, None, 6))
    outputs = RMSNorm()(DenseMML(4)(inputs))
    assert outputs.shape == (None, None, None, 4)
    functional = keras.Model(inputs, outputs)
    for shape in ((2, 3, 5, 6), (1, 7, 1, 6)):
        assert functional(array(*shape)).shape == (*shape[:-1], 4)
    ids = np.array([[1, 2, 0]])
    embedded = keras.layers.Embedding(5, 6, mask_zero=True)(ids)
    masked = RMSNorm()(DenseMML(4)(embedded))
    np.testing.assert_array_equal(numpy(keras.src.backend.get_keras_mask(masked)), ids != 0)


def test_half_precision_keeps_codes_exact():
    x, dense = array(4, 12), layer()
    half = DenseMML(7, dtype="mixed_bfloat16")
    half.build((None, 12))
    half.set_weights([numpy(w) for w in dense.weights])
    y = half(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    np.testing.assert_allclose(numpy(ops.cast(y, "float32")), numpy(dense(x)), rtol=0, atol=0.1)
    half.pack()
    assert keras.backend.standardize_dtype(half(x).dtype) == "bfloat16"


def test_objects_in_configs():
    norm = RMSNorm(
        use_bias=True, gain_regularizer=keras.regularizers.L2(0.5), bias_constraint=keras.constraints.NonNeg()
    )
    dense = DenseMML(
        3,
        activation=keras.activations.gelu,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.3),
        bias_regularizer=keras.regularizers.L1(0.1),
        activity_regularizer=keras.regularizers.L2(0.2),
        kernel_constraint=keras.constraints.MaxNorm(2),
        norm=False,
        scale_gradient=True,
    )
    for made in (norm, dense):
        again = type(made).from_config(made.get_config())
        assert again.get_config() == made.get_config()
    assert again.kernel_initializer.stddev == 0.3
    dense(array(2, 4))
    assert len(dense.losses) == 2


@keras.saving.register_keras_serializable(package="tests")
class Pair(PackedParts, keras.layers.Layer):
    def build(self, shape):
        self.first, self.second = DenseMML(6), DenseMML(4)
        self.first.build(shape)
        self.second.build((*shape[:-1], 6))

    def call(self, x):
        return self.second(self.first(x))


def test_layers_made_of_packed_ones_come_back_packed(tmp_path):
    x, pair = array(3, 24), model(Pair(name="pair"))
    pack(pair, where=lambda layer: layer.units == 4)
    pair.save(tmp_path / "pair.keras")
    loaded = keras.saving.load_model(tmp_path / "pair.keras")
    part = loaded.get_layer("pair")
    assert (part.first.packed, part.second.packed) == (False, True)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), pair.predict(x, verbose=0))


@pytest.mark.parametrize("units", [0, -1, 1.5, True, None])
def test_units_must_be_a_positive_integer(units):
    with pytest.raises(ValueError, match="`units`, expected a positive integer"):
        DenseMML(units)


def test_what_cannot_be_built_or_packed():
    with pytest.raises(ThriftyError, match="last axis must have a fixed length"):
        DenseMML(3).build((None, None))
    with pytest.raises(ValueError, match="min_ndim=2"):
        DenseMML(3)(array(4))
    with pytest.raises(ThriftyError, match="'raw' is not; call it"):
        DenseMML(3, name="raw").pack()
    unbuilt = keras.Sequential([DenseMML(3, name="raw"), keras.layers.Dense(2)])
    with pytest.raises(ThriftyError, match=r"raw of .* are not; call the model once"):
        pack(unbuilt)
    with pytest.raises(ThriftyError, match="none that are accepted"):
        pack(model(keras.layers.Dense(2)))


def test_a_packed_layer_without_weights_and_one_asked_for_gradients():
    waiting = DenseMML(3, packed=True, name="waiting")
    # Raised inside of JAX's runtime, it comes out as an error of that.
    with pytest.raises((ThriftyError, RuntimeError), match="'waiting' has no weights"):
        waiting(array(2, 4))
    before, packed = layer(4, 4), layer(4, 3)
    packed.pack()
    with pytest.raises(ThriftyError, match=r"passes no gradients on.*unpack\(model\)"):
        gradients(lambda: ops.sum(packed(before(array(2, 4)))), before.kernel)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bias": None}, "of 'victim' lacks bias"),
        ({"kernel_scale": None}, "lacks kernel_scale"),
        ({"kernel_version": np.asarray(2)}, "'victim' is of version 2; read it with the version"),
        ({"kernel_shape": np.asarray([12, 7])}, r"the file's has \(12, 7\)"),
        ({"kernel_packed": np.zeros(5, np.uint8)}, "7 x 12 codes take 17 bytes"),
        ({"gain": np.ones(3, np.float32)}, r"'gain' of 'victim' has shape \(12,\)"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_files_change_nothing(change, text, packed):
    victim = layer(name="victim")
    victim.pack()
    store = victim.packed_dense.store() | change
    store = {name: value for name, value in store.items() if value is not None}
    if not packed:
        victim.unpack()
    x = array(2, 12)
    before = numpy(victim(x))
    with pytest.raises(ThriftyError, match=text):
        victim.load_own_variables(store)
    np.testing.assert_array_equal(numpy(victim(x)), before)


def test_an_unbuilt_layer_loads_nothing():
    with pytest.raises(ThriftyError, match="must be built before weights are loaded"):
        DenseMML(3).load_own_variables({})


def test_a_packed_layer_refuses_a_float_kernel():
    packed, store = layer(name="packed"), {}
    packed.save_own_variables(store)
    packed.pack()
    with pytest.raises(ThriftyError, match=r"unpack\(model\) before loading"):
        packed.load_own_variables(store)


@pytest.mark.parametrize(
    ("backend", "code", "text"),
    [
        ("numpy", "", "KERAS_BACKEND must be torch, jax or tensorflow; got 'numpy'"),
        ("jax", "import sys; sys.modules['jax'] = None; ", "pip install 'thrifty[jax]'"),
    ],
)
def test_backends_that_cannot_be_used(backend, code, text):
    done = subprocess.run(
        [sys.executable, "-c", code + "import thrifty.keras"],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": backend},
    )
    assert done.returncode
    assert text in done.stderr
