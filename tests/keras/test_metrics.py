"""Accuracies of groups: a group is right where all of it is."""

import keras
import numpy as np
import pytest
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras.metrics import BinaryGroupAccuracy, CategoricalGroupAccuracy


def one_hot(text: str) -> np.ndarray:
    """The bytes of a text in UTF-32, [1, 4 length, 256]."""
    return np.eye(256, dtype=np.float32)[np.frombuffer(text.encode("utf-32-be"), np.uint8)][None]


TRUE = np.concatenate([one_hot("1" * 16), one_hot("2" * 16)])
PREDICTED = np.concatenate([one_hot("0111111101111110"), one_hot("0002222222222222")])
#: Which characters are right.
RIGHT = np.array([[c == "1" for c in "0111111101111110"], [c == "2" for c in "0002222222222222"]])


def measured(metric, *arrays) -> float:
    metric.update_state(*arrays)
    return float(metric.result())


@pytest.mark.parametrize(
    ("group", "expected"), [(1, 122 / 128), (0, 122 / 128), (None, 122 / 128), (4, 26 / 32), (64, 0)]
)
def test_a_group_is_right_where_all_of_it_is(group, expected):
    assert measured(CategoricalGroupAccuracy(group=group), TRUE, PREDICTED) == pytest.approx(expected)


def test_the_known_values():
    byte_accuracy = CategoricalGroupAccuracy(group=1, name="byte_accuracy")
    assert measured(byte_accuracy, TRUE[:1], PREDICTED[:1]) == 0.953125
    assert measured(CategoricalGroupAccuracy(), TRUE[:1], PREDICTED[:1]) == 0.8125
    assert byte_accuracy.name == "byte_accuracy"


def test_classes_and_texts_without_a_batch():
    assert measured(CategoricalGroupAccuracy(), TRUE.argmax(-1), PREDICTED) == pytest.approx(26 / 32)
    assert measured(CategoricalGroupAccuracy(), TRUE[0], PREDICTED[0]) == pytest.approx(13 / 16)


def test_it_runs_over_batches():
    metric = CategoricalGroupAccuracy()
    metric.update_state(TRUE[:1], PREDICTED[:1])
    assert measured(metric, TRUE[1:], PREDICTED[1:]) == pytest.approx(26 / 32)
    metric.reset_state()
    assert measured(metric, TRUE[1:], PREDICTED[1:]) == pytest.approx(13 / 16)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 16), (2, 64)])
def test_sample_weights(shape):
    weights = np.random.default_rng(0).random(shape).astype(np.float32)
    of_groups = np.broadcast_to(weights.reshape(2, weights.size // 2), (2, max(16, weights.size // 2)))
    of_groups = of_groups.reshape(2, 16, -1).mean(-1)
    expected = (RIGHT * of_groups).sum() / of_groups.sum()
    assert measured(CategoricalGroupAccuracy(), TRUE, PREDICTED, weights) == pytest.approx(expected, rel=1e-5)


def test_masked_elements_do_not_count():
    predicted = ops.convert_to_tensor(PREDICTED)
    mask = np.arange(64)[None] < np.array([[28], [64]])
    predicted._keras_mask = ops.convert_to_tensor(mask)
    groups = mask[:, ::4]
    expected = (RIGHT & groups).sum() / groups.sum()
    assert measured(CategoricalGroupAccuracy(), TRUE, predicted) == pytest.approx(expected)
    weights = np.array([1.0, 3.0])
    expected = ((RIGHT & groups).sum(1) * weights).sum() / (groups.sum(1) * weights).sum()
    assert measured(CategoricalGroupAccuracy(), TRUE, predicted, weights) == pytest.approx(expected)


def test_bits():
    true = np.array([[1, 0, 1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0]], np.float32)
    predicted = np.where(true > 0, 0.6, 0.4).astype(np.float32)
    predicted[0, 1] = 0.7
    assert measured(BinaryGroupAccuracy(group=1), true, predicted) == pytest.approx(15 / 16)
    assert measured(BinaryGroupAccuracy(group=4), true, predicted) == pytest.approx(3 / 4)
    assert measured(BinaryGroupAccuracy(group=8), true.astype(bool), predicted) == pytest.approx(1 / 2)
    logits = np.log(predicted / (1 - predicted))
    assert measured(BinaryGroupAccuracy(group=4, from_logits=True), true, logits) == pytest.approx(3 / 4)
    assert measured(BinaryGroupAccuracy(group=4, threshold=0.65), true, predicted) == pytest.approx(1 / 4)  # zeros
    assert measured(BinaryGroupAccuracy(group=4), true, predicted, [0.0, 1.0]) == 1
    assert measured(BinaryGroupAccuracy(group=8), true, predicted, np.eye(2, 8)) == pytest.approx(1 / 2)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_compiled_model_is_saved_and_loaded(tmp_path, sparse):
    model = keras.Sequential([keras.Input((None, 256)), keras.layers.Activation("linear")])
    metrics = [
        CategoricalGroupAccuracy(group=1, name="byte_accuracy"),
        CategoricalGroupAccuracy(name="character_accuracy"),
    ]
    loss = "sparse_categorical_crossentropy" if sparse else "categorical_crossentropy"
    model.compile("sgd", loss, metrics=metrics, weighted_metrics=[CategoricalGroupAccuracy(name="weighted")])
    true, weights = TRUE.argmax(-1) if sparse else TRUE, np.eye(2, 64)[::-1] + np.eye(2, 64, 63)
    expected = model.evaluate(PREDICTED, true, sample_weight=weights, verbose=0, return_dict=True)
    assert expected["byte_accuracy"] == pytest.approx(122 / 128)
    assert expected["character_accuracy"] == pytest.approx(26 / 32)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(PREDICTED, true, sample_weight=weights, verbose=0, return_dict=True) == expected


def test_callbacks_know_that_more_is_better():
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(3)])
    model.compile("sgd", "mse", metrics=[CategoricalGroupAccuracy(group=2, name="pairs")])
    stop = keras.callbacks.EarlyStopping(monitor="pairs", mode="auto")
    assert "pairs" in model.fit(np.eye(4, 3)[None], np.eye(4, 3)[None], callbacks=[stop], verbose=0).history


@pytest.mark.parametrize(
    "metric",
    [
        CategoricalGroupAccuracy(group=2, name="pairs", dtype="float64" if keras.config.backend() != "jax" else None),
        BinaryGroupAccuracy(group=8, threshold=0.3, from_logits=True, name="bytes"),
    ],
)
def test_config(metric):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert again.get_config() == metric.get_config()
    assert (again.name, again.dtype, again.group) == (metric.name, metric.dtype, metric.group)


@pytest.mark.parametrize(
    ("metric", "arrays", "message"),
    [
        (lambda: CategoricalGroupAccuracy(5), (TRUE, PREDICTED), r"must be a multiple of group=5; got 64"),
        (lambda: CategoricalGroupAccuracy(-1), (TRUE, PREDICTED), r"group must not be negative; got -1"),
        (lambda: CategoricalGroupAccuracy(), (TRUE[:, :60], PREDICTED), r"y_true is one-hot .*got \(2, 60, 256\)"),
        (lambda: CategoricalGroupAccuracy(), (TRUE[..., :1], PREDICTED), r"y_true is one-hot"),
        (lambda: CategoricalGroupAccuracy(), (TRUE[0, 0], PREDICTED), r"y_true is one-hot"),
        (
            lambda: CategoricalGroupAccuracy(),
            (TRUE, PREDICTED, np.ones((2, 8))),
            r"weights are .*got the shape \(2, 8\)",
        ),
        (lambda: CategoricalGroupAccuracy(), (TRUE, PREDICTED, np.ones((2, 16, 4))), r"weights are of samples"),
        (lambda: BinaryGroupAccuracy(), (np.ones((2, 8)), np.ones((2, 4))), r"y_true and y_pred have one shape"),
        (lambda: BinaryGroupAccuracy(threshold=1.5), (), r"threshold must lie between 0 and 1; got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(metric, arrays, message):
    with pytest.raises(ThriftyError, match=r"\[(Categorical|Binary)GroupAccuracy\] .*" + message):
        metric().update_state(*arrays)
