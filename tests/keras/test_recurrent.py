import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras import is_packed, pack
from thrifty.keras.layers import GRUMML, LRUMML, GRUCellMML, LRUCellMML, recurrent
from thrifty.keras.layers.core import dense_layers
from thrifty.keras.packed_dense import PackedDense

BATCH, STEPS, FEATURES = 4, 7, 5
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

MAKERS = {
    "gru": lambda **options: GRUMML(6, num_heads=2, **options),
    "ternary gru": lambda **options: GRUMML(6, fully_mml=True, activation="tanh", **options),
    "lru": lambda **options: LRUMML(3, 4, **options),
    "ternary lru": lambda **options: LRUMML(3, 4, fully_mml=True, use_bias=True, r_min=0.5, **options),
}
#: All is padding, the end is, the start is, here and there is.
MASKS = np.array([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 1, 1, 0]], bool)


@pytest.fixture(params=["gru", "ternary lru"])
def make(request):
    return MAKERS[request.param]


@pytest.fixture(params=MAKERS)
def make_any(request):
    return MAKERS[request.param]


def inputs(steps=STEPS, features=FEATURES, seed=0):
    return np.random.default_rng(seed).standard_normal((BATCH, steps, features)).astype(np.float32)


def start_state(layer):
    return np.random.default_rng(1).standard_normal((BATCH, *layer.cell.state_shape)).astype(np.float32)


def arrays(results):
    return [ops.convert_to_numpy(result) for result in (results if isinstance(results, list | tuple) else [results])]


def run(layer, x, **tensors):
    """Results of a layer as arrays; compiled where that is what takes the least time."""
    if not layer.built:
        layer.build(x.shape)
    call = layer
    if keras.config.backend() == "jax":
        import jax

        call = jax.jit(lambda *given, **named: layer(*given, **named))
    return arrays(call(x, **tensors))


def assert_close(got, expected):
    for one, other in zip(arrays(got), arrays(expected), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def step_form(layer, **options):
    """Plain Keras over the same cell, one step after the other."""
    options |= {"return_sequences": layer.return_sequences, "go_backwards": layer.go_backwards}
    return keras.layers.RNN(layer.cell, return_state=True, **options)


@pytest.mark.parametrize(("sequences", "backwards"), [(True, False), (True, True), (False, True)])
def test_a_sequence_gives_what_its_steps_give(make_any, sequences, backwards):
    layer = make_any(return_sequences=sequences, go_backwards=backwards, return_state=True)
    x, start = inputs(), start_state(layer)
    got = run(layer, x)
    assert_close(got, run(step_form(layer), x))
    assert layer.compute_output_shape(x.shape) == tuple(result.shape for result in got)
    assert_close(run(layer, x, initial_state=start), run(step_form(layer), x, initial_state=[start]))


def test_long_sequences_give_what_their_steps_give(make, monkeypatch):
    """Longer than what is projected at a time, and no multiple of it; masked and not."""
    monkeypatch.setattr(recurrent, "BLOCK_INPUTS", 32 * BATCH * FEATURES)
    layer = make(return_sequences=True, return_state=True)
    x, kept = inputs(101), np.random.default_rng(4).random((BATCH, 101)) > 0.2
    outputs, state = run(layer, x)
    assert_close([outputs, state], run(step_form(layer), x))
    layer.return_sequences = False
    assert_close(run(layer, x), [outputs[:, -1], state])
    layer.return_sequences = True
    masked, masked_state = run(layer, x, mask=kept)
    alone, alone_state = run(layer, x[:1, kept[0]])
    assert_close([masked[0, kept[0]], masked_state[0]], [alone[0], alone_state[0]])


@pytest.mark.parametrize("steps", [1, 2, 64])
def test_decoding_goes_on_from_any_step(make, steps):
    layer = make(return_sequences=True, return_state=True)
    x = inputs(steps + 1)
    outputs, state = run(layer, x)
    states = [ops.convert_to_tensor(run(layer, x[:, :steps])[1])]
    output, states = layer.cell(x[:, steps], states)
    assert_close([output, *states], [outputs[:, -1], state])


@pytest.mark.parametrize(("zeros", "backwards"), [(False, False), (False, True), (True, False)])
def test_masked_steps_are_as_if_they_were_not_there(make, zeros, backwards):
    layer = make(return_sequences=True, return_state=True, go_backwards=backwards, zero_output_for_mask=zeros)
    x, start = inputs(), start_state(layer)
    poisoned = np.where(MASKS[..., None], x, np.nan)
    outputs, states = run(layer, poisoned, mask=MASKS, initial_state=start)
    short = x[MASKS].reshape(3, 3, FEATURES)
    alone, expected_states = run(layer, short, initial_state=start[1:])
    expected = np.zeros_like(outputs)
    kept = MASKS[:, ::-1] if backwards else MASKS
    expected[kept] = alone.reshape(9, -1)
    if not zeros:
        for t in range(1, STEPS):
            expected[:, t] = np.where(kept[:, t, None], expected[:, t], expected[:, t - 1])
    assert_close([outputs, states[1:]], [expected, expected_states])
    np.testing.assert_array_equal(states[0], start[0])
    layer.return_sequences = False
    assert_close(run(layer, poisoned, mask=MASKS, initial_state=start), [outputs[:, -1], states])


@pytest.mark.skipif(keras.config.backend() == "jax", reason="Keras' own loop takes states for outputs there")
@pytest.mark.parametrize("zeros", [True, False])
def test_masks_mean_what_they_mean_to_keras(make, zeros):
    for sequences in (True, False):
        layer = make(return_sequences=sequences, return_state=True, zero_output_for_mask=zeros)
        by_steps = step_form(layer, zero_output_for_mask=zeros)
        mask = ops.convert_to_tensor(MASKS)
        assert_close(run(layer, inputs(), mask=mask), run(by_steps, inputs(), mask=mask))


def test_training_moves_every_weight_as_training_by_steps_does(make):
    x, y = inputs(), np.random.default_rng(5).standard_normal((BATCH, STEPS, 2)).astype(np.float32)
    layer = make(return_sequences=True)
    models = []
    for one in (layer, keras.layers.RNN(type(layer.cell).from_config(layer.cell.get_config()), True)):
        model = keras.Sequential([keras.Input((STEPS, FEATURES)), one, keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.5), "mse")
        models.append(model)
    models[1].set_weights(models[0].get_weights())
    before = models[0].get_weights()
    for model in models:
        model.train_on_batch(x, y)
    for start, one, other, variable in zip(
        before, *(model.get_weights() for model in models), models[0].weights, strict=True
    ):
        np.testing.assert_allclose(one, other, err_msg=variable.path, rtol=1e-4, atol=1e-5)
        assert np.abs(one - start).max() > 0, variable.path


def test_masked_steps_train_nothing(make):
    x, y = inputs(), np.ones((BATCH, 2), np.float32)
    weights = []
    for padding in (0.0, 100.0):
        keras.utils.set_random_seed(0)
        sequences, mask = keras.Input((STEPS, FEATURES)), keras.Input((STEPS,), dtype="bool")
        model = keras.Model([sequences, mask], keras.layers.Dense(2)(make()(sequences, mask=mask)))
        model.compile(keras.optimizers.SGD(0.5), "mse")
        model.train_on_batch([np.where(MASKS[..., None], x, padding), MASKS], y)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_states_are_kept_from_batch_to_batch(make):
    layer = make(stateful=True, return_sequences=True)
    x = inputs(10)
    pieces = [arrays(layer(x[:, :4]))[0], arrays(layer(x[:, 4:]))[0]]
    layer.reset_state()
    assert_close(layer(x), np.concatenate(pieces, 1))
    with pytest.raises(ValueError, match="batch size"):
        layer(x[:2])


def test_a_model_takes_any_length_mask_and_direction(make):
    tokens = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(9, FEATURES, mask_zero=True)(tokens)
    model = keras.Model(tokens, keras.layers.Bidirectional(make(return_sequences=True))(embedded))
    assert model.output_shape[:2] == (None, None)
    long = np.random.default_rng(2).integers(1, 9, (2, 9))
    long[:, 5:] = 0
    expected = model.predict(long[:, :5], verbose=0)
    np.testing.assert_allclose(model.predict(long, verbose=0)[:, :5], expected, **CLOSE)


def test_unrolling_changes_nothing(make):
    layer = make(return_sequences=True)
    expected = run(layer, inputs())
    layer.unroll = True
    assert_close(run(layer, inputs()), expected)


def test_heads_give_the_state_its_shape_and_change_no_number():
    one, three = GRUMML(6, return_state=True), GRUMML(6, num_heads=3, return_state=True)
    x = inputs()
    expected = run(one, x)
    three.build(x.shape)
    three.set_weights(one.get_weights())
    outputs, state = run(three, x)
    assert state.shape == (BATCH, 3, 2)
    np.testing.assert_array_equal(outputs, expected[0])
    np.testing.assert_array_equal(state.reshape(BATCH, 1, 6), expected[1])


def test_a_state_of_another_shape_is_refused(make):
    layer = make()
    with pytest.raises(ThriftyError, match=rf"\[{type(layer).__name__}\] initial_state must be \[B, 2|1, "):
        layer(inputs(), initial_state=np.zeros((BATCH, 6), np.float32))


def test_the_poles_of_an_lru_start_on_the_ring():
    cell = LRUCellMML(2, 500, r_min=0.6, r_max=0.9, max_phase=1.0)
    cell.build((None, 3))
    nu, theta, gamma = (ops.convert_to_numpy(log) for log in (cell.nu_log, cell.theta_log, cell.gamma_log))
    radius = np.exp(-np.exp(nu))
    assert 0.6 <= radius.min() < 0.65
    assert 0.85 < radius.max() <= 0.9
    assert 0 < np.exp(theta).min() < 0.05
    assert 0.95 < np.exp(theta).max() <= 1
    np.testing.assert_allclose(np.exp(gamma), np.sqrt(1 - radius**2), rtol=1e-4)
    assert np.abs(np.corrcoef(radius, theta)[0, 1]) < 0.2
    assert not np.array_equal(*(ops.convert_to_numpy(part.kernel) for part in (cell.B_re, cell.B_im)))


@pytest.mark.parametrize("layer", [GRUMML, GRUCellMML])
def test_what_a_gru_refuses(layer):
    for units in (0, -1, 1.5):
        with pytest.raises(
            ThriftyError, match=rf"\[{layer.__name__}\] .*`units`, expected a positive integer, got {units}"
        ):
            layer(units)
    with pytest.raises(ThriftyError, match=r"`num_heads`, expected a positive integer, got 0"):
        layer(4, num_heads=0)
    with pytest.raises(ThriftyError, match=r"units must be a multiple of num_heads = 3; got 4"):
        layer(4, num_heads=3)


@pytest.mark.parametrize("layer", [LRUMML, LRUCellMML])
def test_what_an_lru_refuses(layer):
    with pytest.raises(ThriftyError, match=rf"\[{layer.__name__}\] .*`units`"):
        layer(0, 2)
    with pytest.raises(ThriftyError, match=r"`state_dim`, .* got -2"):
        layer(1, -2)
    for r_min, r_max in ((-0.1, 1), (0.9, 0.8), (0, 1.1), (0, 0), (1, 1)):
        with pytest.raises(ThriftyError, match="within the unit circle"):
            layer(1, 2, r_min=r_min, r_max=r_max)
    for phase in (0, 6.3):
        with pytest.raises(ThriftyError, match="max_phase"):
            layer(1, 2, max_phase=phase)


def test_configs_hold_any_object(tmp_path):
    layer = GRUMML(
        4,
        weights_initializer=keras.initializers.RandomNormal(stddev=0.3),
        bias_initializer=keras.initializers.Constant(0.1),
        weights_regularizer=keras.regularizers.L2(0.01),
        weights_constraint=keras.constraints.MaxNorm(3),
        recurrent_activation=keras.activations.hard_sigmoid,
        activity_regularizer=keras.regularizers.L1(0.1),
        zero_output_for_mask=True,
    )
    model = keras.Sequential([keras.Input((None, FEATURES)), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").layers[0]
    for one in (loaded, GRUMML.from_config(layer.get_config())):
        assert one.get_config() == layer.get_config()
        assert one.cell.get_config() == layer.cell.get_config()
    assert len(loaded.losses) == 3  # of two dense layers and one ternary one
    assert isinstance(loaded.cell.kernel.kernel_constraint, keras.constraints.MaxNorm)


def test_it_trains_is_saved_packed_and_saved_again(make, tmp_path):
    x, y = inputs(), np.ones((BATCH, 1), np.float32)
    layer = make()
    model = keras.Sequential([keras.Input((None, FEATURES)), layer, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    for stage in ("trained.keras", "packed.keras"):
        expected = model.predict(x, verbose=0)
        model.save(tmp_path / stage)
        loaded = keras.saving.load_model(tmp_path / stage)
        assert loaded.layers[0].get_config() == layer.get_config()
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
        if stage == "trained.keras":
            pack(model)
            np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-4)


def test_a_packed_layer_multiplies_once_for_all_steps_and_still_takes_single_ones(make_any, monkeypatch):
    layer = make_any(return_sequences=True, return_state=True)
    layer.build((BATCH, STEPS, FEATURES))
    pack(layer)
    rows = []
    on_array = PackedDense.on_array

    def counted(self, x):
        rows.append(x.size // x.shape[-1])
        return on_array(self, x)

    monkeypatch.setattr(PackedDense, "on_array", counted)
    outputs, state = run(layer, inputs())
    assert len(rows) == sum(one.packed for one in dense_layers(layer))
    assert set(rows) == {BATCH * STEPS}
    states = layer.get_initial_state(BATCH)
    for t in range(STEPS):
        output, states = layer.cell(inputs()[:, t], states)
        np.testing.assert_allclose(ops.convert_to_numpy(output), outputs[:, t], **CLOSE)
    assert_close(states, [state])


def test_both_directions_and_plain_keras_keep_what_is_packed(tmp_path):
    x = inputs()
    model = keras.Sequential(
        [
            keras.Input((STEPS, FEATURES)),
            keras.layers.Bidirectional(GRUMML(4, return_sequences=True)),
            keras.layers.RNN(LRUCellMML(3, 4)),
        ]
    )
    pack(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert is_packed(loaded)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_half_precision_computes_its_state_in_float32(make):
    layer = make(dtype="mixed_bfloat16", return_sequences=True, return_state=True)
    exact = make(return_sequences=True, return_state=True)
    x = inputs()
    expected = run(exact, x)
    layer.build(x.shape)
    layer.set_weights(exact.get_weights())
    for result, exact_result in zip(layer(x), expected, strict=True):
        assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
        difference = np.abs(ops.convert_to_numpy(ops.cast(result, "float32")) - exact_result).max()
        assert difference < 0.05 * np.abs(exact_result).max()


def test_half_precision_turns_states_as_float32_does():
    exact, half = LRUCellMML(4, 6, r_min=0.99), LRUCellMML(4, 6, r_min=0.99, dtype="mixed_bfloat16")
    for cell in (exact, half):
        cell.build((None, 3))
    half.set_weights(exact.get_weights())
    turns = [ops.convert_to_numpy(cell.drive(np.ones((1, 3), np.float32))[0]) for cell in (exact, half)]
    np.testing.assert_array_equal(*turns)
