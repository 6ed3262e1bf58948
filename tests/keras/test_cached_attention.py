"""Attention with a cache answers what it answers without one."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras.layers.transformer import CachedMultiHeadAttention

RNG = np.random.default_rng(0)
HEADS = [{}, {"num_kv_heads": 2}]


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def numpy(x) -> np.ndarray:
    return ops.convert_to_numpy(x)


def close(actual, expected, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(numpy(actual).astype(np.float32), numpy(expected), rtol=0, atol=atol)


def attention(**options) -> CachedMultiHeadAttention:
    """Four heads of 5 for 12 features, with biases that count."""
    return CachedMultiHeadAttention(4, 5, bias_initializer="random_normal", **options)


@functools.cache
def shared(**options):
    """A layer, and calls of it, which JAX compiles as a whole: op by op takes it long."""
    layer = attention(**options)
    layer.build((2, 6, 12), (2, 6, 12))
    if keras.config.backend() != "jax":
        return layer, layer
    import jax

    return layer, jax.jit(layer, static_argnames=("return_attention_scores", "use_causal_mask"))


def stepped(call, x: np.ndarray, cache, chunks: list[int], start: int = 0, **options):
    """The outputs of chunks of x from slot `start` on, one after the other, and the cache."""
    outputs, first = [], start
    for length in chunks:
        chunk = x[:, first - start : first - start + length]
        output, cache = call(chunk, chunk, cache=cache, step=first, **options)
        outputs.append(numpy(output))
        first += length
    return np.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize(("causal", "length"), [(True, 7), (True, 4), (False, 4)])
def test_without_a_cache_it_is_keras(causal, length):
    query, value, key = array(2, 7, 12), array(2, length, 9), array(2, length, 11)
    layer = attention(value_dim=3, output_shape=8)
    peer = keras.layers.MultiHeadAttention(4, 5, value_dim=3, output_shape=8)
    output, scores, cache = layer(query, value, key, return_attention_scores=True, use_causal_mask=causal)
    peer.build(query.shape, value.shape, key.shape)
    peer.set_weights(layer.get_weights())
    expected, expected_scores = peer(query, value, key, return_attention_scores=True, use_causal_mask=causal)
    assert cache is None
    np.testing.assert_array_equal(numpy(output), numpy(expected))
    np.testing.assert_array_equal(numpy(scores), numpy(expected_scores))


@pytest.mark.parametrize("options", [*HEADS, {"sliding_window": 3}])
def test_steps_and_chunks_answer_as_the_whole_does(options):
    x, (layer, call) = array(2, 6, 12), shared(**options)
    whole, scores, _ = call(x, x, return_attention_scores=True)
    for chunks in ([1] * 6, [6], [4, 1, 1]):
        output, cache = stepped(call, x, layer.create_cache(2, 8), chunks)
        close(output, whole)
    output, parts, _ = call(x[:, 5:], x[:, 5:], cache=cache, step=5, return_attention_scores=True)
    close(output, numpy(whole)[:, 5:])
    parts = numpy(parts)
    close(parts[..., :6], numpy(scores)[:, :, 5:])
    assert not parts[..., 6:].any()


@pytest.mark.parametrize("options", HEADS)
def test_appending_answers_as_the_whole_does(options):
    x, (layer, call) = array(2, 6, 12), shared(**options)
    whole, _ = call(x, x)
    cache, outputs = layer.create_cache(2, 0), []
    for first, last in ((0, 4), (4, 5), (5, 6)):
        output, cache = call(x[:, first:last], x[:, first:last], cache=cache)
        assert cache.shape[2] == last
        outputs.append(numpy(output))
    close(np.concatenate(outputs, axis=1), whole)
    _, filled = stepped(call, x, layer.create_cache(2, 8), [4, 1, 1])
    close(cache, numpy(filled)[:, :, :6])


@pytest.mark.parametrize("garbage", [7.0, 1e30, np.nan])
@pytest.mark.parametrize("causal", [True, False])
def test_what_was_never_written_changes_nothing(garbage, causal):
    x, (layer, call) = array(2, 5, 12), shared(num_kv_heads=2)
    clean = layer.create_cache(2, 8)
    expected, _ = stepped(call, x, clean, [4, 1], use_causal_mask=causal)
    output, _ = stepped(call, x, np.full_like(numpy(clean), garbage), [4, 1], use_causal_mask=causal)
    np.testing.assert_array_equal(numpy(output), numpy(expected))


def test_without_the_causal_mask_a_chunk_sees_all_of_itself():
    x, (layer, call) = array(2, 6, 12), shared()
    whole, _ = call(x, x, use_causal_mask=False)
    output, _ = stepped(call, x, layer.create_cache(2, 8), [6], use_causal_mask=False)
    close(output, whole)
    last, _ = call(x[:, :2], x, cache=layer.create_cache(2, 8), step=0, use_causal_mask=False)
    close(last, numpy(whole)[:, :2])


def test_a_slot_is_overwritten():
    x, (layer, call) = array(2, 6, 12), shared()
    whole, _ = call(x, x)
    _, cache = stepped(call, array(2, 6, 12), layer.create_cache(2, 8), [6])
    output, _ = stepped(call, x, cache, [4, 1, 1])
    close(output, whole)


@pytest.mark.parametrize(("options", "length"), [(HEADS[0], 1), (HEADS[1], 3)])
def test_one_traced_step_serves_all(traced, options, length):
    x, layer = array(2, 6, 12), attention(**options)
    whole, _ = layer(x, x)
    step = traced(lambda chunk, cache, step: layer(chunk, chunk, cache=cache, step=step))
    cache, outputs = layer.create_cache(2, 8), []
    for first in range(0, 6, length):
        chunk = ops.convert_to_tensor(x[:, first : first + length])
        output, cache = step(chunk, cache, ops.convert_to_tensor(first))
        outputs.append(numpy(output))
    close(np.concatenate(outputs, axis=1), whole)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="XLA is a choice in TensorFlow only")
def test_xla():
    import tensorflow as tf

    x, layer = array(2, 4, 12), attention(num_kv_heads=2)
    whole, _ = layer(x, x)
    call = tf.function(lambda chunk, cache, step: layer(chunk, chunk, cache=cache, step=step), jit_compile=True)
    cache = layer.create_cache(2, 6)
    for t in range(4):
        output, cache = call(tf.constant(x[:, t : t + 1]), cache, tf.constant(t))
        close(output, whole[:, t : t + 1])
    grow = tf.function(layer, jit_compile=True)
    close(grow(tf.constant(x), tf.constant(x), cache=layer.create_cache(2, 0))[0], whole)


def test_grouped_heads_are_repeated_heads():
    x, mask = array(2, 6, 12), RNG.random((2, 6, 6)) > 0.2
    mask |= np.eye(6, dtype=bool)
    grouped, full = attention(num_kv_heads=2), attention()
    grouped.build(x.shape, x.shape)
    full.build(x.shape, x.shape)
    weights = {w.path.split("/", 1)[1]: numpy(w) for w in grouped.weights}
    assert [w.path.split("/", 1)[1] for w in full.weights] == list(weights)
    for variable in full.weights:
        value = weights[variable.path.split("/", 1)[1]]
        repeated = value if value.shape == variable.shape else np.repeat(value, 2, axis=-2)
        variable.assign(repeated)
    for options in ({}, {"use_causal_mask": False}, {"attention_mask": mask}, {"attention_mask": mask[:, None]}):
        output, scores, _ = grouped(x, x, return_attention_scores=True, **options)
        expected, expected_scores, _ = full(x, x, return_attention_scores=True, **options)
        close(output, expected)
        close(scores, expected_scores)
    assert grouped.count_params() < full.count_params()
    assert grouped.create_cache(2, 8).shape[3] == 2


@pytest.mark.parametrize("options", HEADS)
def test_an_attention_mask_over_the_cache_hides_padding(options):
    """Texts padded on the left answer as they do alone."""
    x, (layer, call) = array(2, 6, 12), shared(**options)
    padding = np.array([2, 0])
    slots = np.arange(8)[None, None] >= padding[:, None, None]  # [B, 1, S]
    output, cache = stepped(call, x, layer.create_cache(2, 8), [4], attention_mask=np.repeat(slots, 4, axis=1))
    more, cache = stepped(call, x[:, 4:], cache, [1, 1], start=4, attention_mask=slots)
    per_head, _ = stepped(call, x[:, 5:], cache, [1], start=5, attention_mask=np.repeat(slots[:, None], 4, axis=1))
    output = np.concatenate([output, more], axis=1)
    close(per_head, output[:, 5:])
    close(output[1:], call(x[1:], x[1:])[0])
    close(output[:1, 2:], call(x[:1, 2:], x[:1, 2:])[0])


@pytest.mark.parametrize("options", HEADS)
def test_masks_of_keras(options):
    tokens = np.array([[1, 2, 1, 0, 0], [2, 1, 1, 2, 0]])
    embedded = keras.layers.Embedding(3, 12, mask_zero=True)(tokens)
    mask = numpy(embedded._keras_mask)
    layer = attention(**options)
    output, _ = layer(embedded, embedded, use_causal_mask=False)
    np.testing.assert_array_equal(numpy(output._keras_mask), mask)
    for row, length in ((0, 3), (1, 4)):
        alone = numpy(embedded)[row : row + 1, :length]
        close(numpy(output)[row : row + 1, :length], layer(alone, alone, use_causal_mask=False)[0])
    embedded = keras.layers.Embedding(3, 12, mask_zero=True)(tokens)
    with pytest.raises(ThriftyError, match="a cache does not remember masks"):
        layer(embedded, embedded, cache=layer.create_cache(2, 8), step=0)
    everything = np.ones((2, 1, 8), bool)
    output, _ = layer(embedded, embedded, cache=layer.create_cache(2, 8), step=0, attention_mask=everything)
    close(output, layer(numpy(embedded), numpy(embedded))[0])


def test_low_precision():
    x, layer = array(2, 6, 12), attention(dtype="mixed_bfloat16", num_kv_heads=2)
    cache = layer.create_cache(2, 8)
    assert keras.backend.standardize_dtype(cache.dtype) == "bfloat16"
    whole, _ = layer(x, x)
    output, cache = stepped(layer, x, cache, [6])
    assert keras.backend.standardize_dtype(cache.dtype) == "bfloat16"
    close(output, numpy(whole).astype(np.float32), atol=3e-2)


@pytest.mark.parametrize("options", HEADS)
def test_a_model_with_a_cache_is_saved_and_loaded(tmp_path, options):
    x = keras.Input((None, 12))
    kv_heads = options.get("num_kv_heads", 4)
    cache = keras.Input(batch_shape=(2, None, None, kv_heads, 5))
    step = keras.Input(batch_shape=(), dtype="int32")
    output, scores, kept = attention(**options)(x, x, cache=cache, step=step, return_attention_scores=True)
    assert output.shape == (None, None, 12)
    assert scores.shape == (None, 4, None, None)
    assert kept.shape == (2, None, None, kv_heads, 5)
    model = keras.Model([x, cache, step], [output, scores, kept])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    data = ops.convert_to_tensor(array(2, 3, 12))
    inputs = [data, ops.convert_to_tensor(array(2, 2, 8, kv_heads, 5)), ops.convert_to_tensor(2)]
    for one, other in zip(model(inputs), loaded(inputs), strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))


@pytest.mark.parametrize("options", HEADS)
def test_a_model_trains_without_a_cache(options):
    x = keras.Input((None, 12))
    output, _ = attention(dropout=0.1, **options)(x, x)
    model = keras.Model(x, output)
    model.compile("sgd", "mse")
    before = model.get_weights()
    model.fit(array(4, 6, 12), array(4, 6, 12), verbose=0)
    assert all((a != b).any() for a, b in zip(model.get_weights()[::2], before[::2], strict=True))


def test_dropout_is_for_training():
    x, layer = array(2, 6, 12), attention(dropout=0.5, num_kv_heads=2)
    np.testing.assert_array_equal(numpy(layer(x, x)[0]), numpy(layer(x, x)[0]))
    assert (numpy(layer(x, x, training=True)[0]) != numpy(layer(x, x)[0])).any()


def test_config():
    layer = attention(num_kv_heads=2, kernel_initializer=keras.initializers.HeNormal(seed=3), output_shape=(2, 7))
    again = CachedMultiHeadAttention.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    x = array(2, 3, 12)
    assert layer(x, x)[0].shape == (2, 3, 2, 7)
    assert layer.compute_output_shape(x.shape, x.shape) == (2, 3, 2, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"step": -1}, r"step \.\.\. step \+ 2 - 1 must lie in a cache of 6; got step=-1"),
        ({"step": 5}, r"must lie in a cache of 6; got step=5"),
        ({"step": np.int64(5)}, r"must lie in a cache of 6; got step=5"),
        ({"step": 1.5}, r"step must be one integer; got 1.5"),
        ({"step": np.array([1, 2])}, r"step must be one integer"),
        ({"step": 0, "training": True}, r"passes no gradients on; got training=True"),
        ({"step": 0, "cache": np.zeros((2, 2, 6, 4, 4), np.float32)}, r"a cache has the shape .*create_cache"),
        ({"step": 0, "cache": np.zeros((2, 3, 6, 4, 5), np.float32)}, r"a cache has the shape"),
        ({"step": 0, "cache": np.zeros((2, 2, 6, 20), np.float32)}, r"a cache has the shape"),
        ({"step": 0, "value": np.zeros((2, 3, 12), np.float32)}, r"the same positions; got 2 and 3"),
        (
            {"step": 0, "attention_mask": np.ones((2, 2, 5), bool)},
            r"attention_mask has the shape .*S = 6.*got \(2, 2, 5\)",
        ),
        ({"step": 0, "attention_mask": np.ones((2, 3, 6), bool)}, r"attention_mask has the shape"),
        ({"step": 0, "attention_mask": np.ones(6, bool)}, r"attention_mask has the shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    x, layer = array(2, 2, 12), attention()
    with pytest.raises(ThriftyError, match=r"\[CachedMultiHeadAttention\] .*" + message):
        layer(**{"query": x, "value": x, "cache": layer.create_cache(2, 6), **call})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads=4; got 3"),
        ({"num_kv_heads": 0}, r"num_kv_heads must divide"),
        ({"value_dim": 3}, r"value_dim = key_dim = 5; got 3"),
        ({"attention_axes": (1, 2)}, r"a cache needs inputs \[B, T, dim\]"),
        ({"attention_axes": (2,), "num_kv_heads": 2}, r"num_kv_heads needs inputs \[B, T, dim\]"),
    ],
)
def test_layers_that_take_no_cache(options, message):
    x = array(2, 2, 12) if "attention_axes" not in options else array(2, 2, 3, 12)
    with pytest.raises(ThriftyError, match=r"\[CachedMultiHeadAttention\] .*" + message):
        attention(**options)(x, x, cache=np.zeros((2, 2, 6, 4, 5), np.float32), step=0)


def test_a_cache_of_no_size():
    with pytest.raises(ThriftyError, match="a cache has a batch and a length of 0 or more; got 2 and -1"):
        attention().create_cache(2, -1)
