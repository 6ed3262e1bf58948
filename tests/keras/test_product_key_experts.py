"""Experts found by product keys: which are chosen, and what a model of them can do."""

import keras
import numpy as np
import pytest
from keras import ops

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.keras import is_packed, pack
from thrifty.keras.layers import CrossDomainMoE
from thrifty.keras.layers.product_key_experts import best_pairs

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 9), (5, 7), (20, 31)])
def test_the_best_pairs_are_those_of_the_spec(n, k):
    x, y = array(8, n), array(8, n)
    # Few values, and so far from one another that sums round: ties of all kinds.
    x[2:4], y[2:4] = np.round(x[2:4]), np.round(y[2:4])
    x[4:7] += np.float32(1 << 20)
    x[7], y[7] = 0, 0
    chosen = ops.convert_to_numpy(best_pairs(ops.convert_to_tensor(x), ops.convert_to_tensor(y), k))
    np.testing.assert_array_equal(np.sort(chosen, -1), np.sort(spec.product_key_topk(x, y, k)[1], -1))


@pytest.mark.parametrize("shape", [(7, 12), (2, 1, 3, 12)])
def test_a_token_is_answered_alone(shape):
    x, layer = array(*shape), CrossDomainMoE(25, 4, 2, key_dim=6)
    y = ops.convert_to_numpy(layer(x))
    assert y.shape == shape == layer.compute_output_shape(shape)
    row = ops.convert_to_numpy(layer(x.reshape(-1, 12)[3:4]))
    np.testing.assert_allclose(y.reshape(-1, 12)[3:4], row, rtol=0, atol=1e-5 * np.abs(row).max())


@pytest.mark.parametrize(("router", "linear"), [("product_key_heads", "ternary"), ("linear", "dense")])
def test_train_save_load_and_pack(router, linear, tmp_path):
    inputs = keras.Input((None, 12))
    layer = CrossDomainMoE(
        *(25, 4),
        router=router,
        linear=linear,
        key_dim=6,
        intermediate_dim=20,
        activation=keras.activations.relu,
        router_aux_loss_coef=0.01,
        kernel_initializer=keras.initializers.HeNormal(seed=3),
        kernel_regularizer=keras.regularizers.L2(1e-4),
    )
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    model.compile("adam", "mse")
    x = array(4, 10, 12)
    x[0, 6:] = 0
    before = [ops.convert_to_numpy(w) for w in model.trainable_weights]
    model.fit(x, array(4, 10, 12), verbose=0)
    for variable, old in zip(model.trainable_weights, before, strict=True):
        new = ops.convert_to_numpy(variable)
        assert np.isfinite(new).all()
        assert (new != old).any(), variable.path
    y = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), y)
    assert loaded.layers[-1].get_config() == layer.get_config()
    if linear == "ternary":
        pack(loaded)
        np.testing.assert_allclose(loaded.predict(x, verbose=0), y, rtol=0, atol=1e-2 * np.abs(y).max())
        loaded.save(tmp_path / "packed.keras")
        packed = keras.saving.load_model(tmp_path / "packed.keras")
        assert is_packed(packed)
        np.testing.assert_array_equal(packed.predict(x, verbose=0), loaded.predict(x, verbose=0))


def test_the_balance_loss_is_one_where_all_is_even_and_padding_does_not_count():
    x, mask = array(2, 30, 12), np.ones((2, 30), bool)
    mask[0, 20:] = False
    layer = CrossDomainMoE(25, 25, key_dim=6, router_aux_loss_coef=0.5)
    layer(x)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.losses[-1]), 0.5, rtol=1e-5)  # all choose all
    layer = CrossDomainMoE(25, 4, key_dim=6, router_aux_loss_coef=0.5)
    layer(x, mask=mask)
    loss = ops.convert_to_numpy(layer.losses[-1])
    x[0, 20:] = 9
    layer(x, mask=mask)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.losses[-1]), loss, rtol=1e-5)
    layer(x)
    assert abs(ops.convert_to_numpy(layer.losses[-1]) - loss) > 1e-2 * loss


def test_mixed_precision():
    y = CrossDomainMoE(25, 4, key_dim=6, dtype="mixed_bfloat16")(array(2, 5, 12))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert np.isfinite(ops.convert_to_numpy(ops.cast(y, "float32"))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 24}, "take 16 or 25"),
        ({"num_experts": 0}, "take 1 or 1"),
        ({"num_experts": 25, "experts_per_head": 26}, "experts_per_head must be 1 to num_experts = 25; got 26"),
        ({"router": "hash"}, "router must be one of product_key_heads, linear"),
        ({"router": "linear", "num_heads": 2}, "num_heads must be 1 with router='linear'"),
        ({"key_dim": 5}, "key_dim must be even"),
        ({"linear": "binary"}, "linear must be one of dense, ternary"),
        ({"intermediate_dim": 0}, "`intermediate_dim`"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ThriftyError, match=r"^\[CrossDomainMoE\].*") as error:
        CrossDomainMoE(**options)
    assert message in str(error.value)
