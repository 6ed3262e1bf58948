"""Attention over the keys that score best: what a query sees, and what a model of it can do."""

import sys

import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras import is_packed, pack
from thrifty.keras.layers import DynamicMaskAttention

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def made(**options) -> DynamicMaskAttention:
    """A layer whose keys score unlike each other."""
    layer = DynamicMaskAttention(4, 6, 2, **{"window": 5, "rope_theta": 10_000.0, **options})
    layer.build((None, None, 16))
    layer.A.assign(array(*layer.A.shape))
    return layer


def answer(layer: keras.layers.Layer, x: np.ndarray, **options) -> np.ndarray:
    return ops.convert_to_numpy(layer(x, **options))


@pytest.mark.parametrize("options", [{}, {"dt_heads": "attention", "qk_norm": True}, {"linear": "ternary"}])
def test_later_tokens_change_nothing_before_them(options):
    x, layer = array(2, 100, 16), made(**options)
    y = answer(layer, x)
    x[:, 70] += 10
    changed = answer(layer, x)
    np.testing.assert_allclose(changed[:, :70], y[:, :70], rtol=0, atol=1e-6)
    assert (changed[:, 70] != y[:, 70]).any()


@pytest.mark.parametrize(("side", "window"), [("left", 5), ("right", 5), ("left", 100)])
def test_padding_is_as_if_it_was_not_there(side, window):
    x, layer = array(2, 100, 16), made(window=window, use_bias=True)
    kept = slice(30, None) if side == "left" else slice(70)
    mask = np.zeros((2, 100), bool)
    mask[:, kept] = True
    y = answer(layer, x, mask=mask)
    expected = answer(layer, x[:, kept])
    np.testing.assert_allclose(y[:, kept], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if side == "left":  # a query without any key
        np.testing.assert_array_equal(y[:, :30], np.broadcast_to(ops.convert_to_numpy(layer.o_proj.bias), (2, 30, 16)))


def test_a_window_that_holds_all_keys_is_none():
    x, layer = array(2, 70, 16), made(window=70)
    everything = made(window=None, selection="none")
    everything.set_weights(layer.get_weights())
    np.testing.assert_array_equal(answer(layer, x), answer(everything, x))
    fewer = made(window=69)
    fewer.set_weights(layer.get_weights())
    difference = np.abs(answer(fewer, x) - answer(everything, x)).max(axis=(0, 2))
    assert difference[:69].max() < 1e-6
    assert difference[69] > 1e-6


def test_a_ratio_keeps_as_many_keys_as_its_window():
    x, layer = array(2, 100, 16), made()
    ratio = made(selection="ratio", ratio=0.1, max_positions=59)
    ratio.set_weights(layer.get_weights())
    np.testing.assert_array_equal(answer(ratio, x), answer(layer, x))


def test_equal_scores_keep_the_newest_keys():
    x, layer = array(2, 100, 16), made()
    layer.A.assign(np.zeros(2))  # as it is at first
    y = answer(layer, x)
    x[:, :95] = array(2, 95, 16)
    np.testing.assert_array_equal(answer(layer, x)[:, 99], y[:, 99])


@pytest.mark.parametrize("linear", ["dense", "ternary"])
def test_train_save_load_and_pack(linear, tmp_path):
    inputs = keras.Input((None, 16))
    layer = DynamicMaskAttention(
        *(2, 6),
        window=9,
        dropout=0.1,
        sub_norm=True,
        linear=linear,
        kernel_initializer=keras.initializers.HeNormal(seed=3),
        kernel_regularizer=keras.regularizers.L2(1e-4),
        kernel_constraint=keras.constraints.MaxNorm(5.0),
    )
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    model.compile("adam", "mse")
    x = array(2, 100, 16)
    x[0, 80:] = 0
    model.fit(x, array(2, 100, 16), verbose=0)
    assert all(np.isfinite(ops.convert_to_numpy(w)).all() for w in model.weights)
    y = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), y)
    assert loaded.layers[-1].get_config() == layer.get_config()
    if linear == "ternary":
        pack(loaded)
        np.testing.assert_allclose(loaded.predict(x, verbose=0), y, rtol=0, atol=2e-2 * np.abs(y).max())
        loaded.save(tmp_path / "packed.keras")
        packed = keras.saving.load_model(tmp_path / "packed.keras")
        assert is_packed(packed)
        np.testing.assert_array_equal(packed.predict(x, verbose=0), loaded.predict(x, verbose=0))


def test_shapes_masks_and_mixed_precision():
    layer = DynamicMaskAttention(2, 6, window=9, rope_theta=10_000.0, qk_norm=True, dtype="mixed_bfloat16")
    inputs = keras.Input((None, 16))
    outputs = layer(inputs)
    assert outputs.shape == layer.compute_output_shape((None, None, 16)) == (None, None, 16)
    assert layer.compute_mask(inputs, "the mask") == "the mask"
    y = layer(array(2, 100, 16))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert np.isfinite(ops.convert_to_numpy(ops.cast(y, "float32"))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2, "window": 1}, "num_heads must be a multiple of num_kv_heads"),
        ({"num_heads": 0, "window": 1}, "`num_heads`"),
        ({}, "window must be an integer of at least 1; got None"),
        ({"window": 0}, "selection='none' keeps every key"),
        ({"selection": "ratio", "ratio": 0.1}, "keep one key of max_positions"),
        ({"selection": "ratio_legacy"}, "selection must be one of none, keep_window, ratio"),
        ({"window": 1, "dt_heads": "all"}, "dt_heads must be one of"),
        ({"window": 1, "linear": "binary"}, "linear must be one of dense, ternary"),
        ({"window": 1, "key_dim": 5, "rope_theta": 1e4}, "key_dim must be even"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ThriftyError, match=r"^\[DynamicMaskAttention\].*") as error:
        DynamicMaskAttention(**{"num_heads": 2, "key_dim": 4, **options})
    assert message in str(error.value)


def test_what_ranks_keys_is_not_rounded_in_low_precision(monkeypatch):
    layer = DynamicMaskAttention(2, 6, window=9, dtype="mixed_bfloat16")
    layer.build((None, None, 16))
    x, seen = array(1, 40, 16), []

    def attend(q, k, v, scores, *options):
        seen.append(ops.convert_to_numpy(scores))
        return v

    monkeypatch.setattr(sys.modules[DynamicMaskAttention.__module__], "dynamic_mask_attention", attend)
    for A in (1.0, 1.003):  # one number in bfloat16
        layer.A.assign(np.full(2, A))
        layer(x)
    assert (seen[0] != seen[1]).all()
