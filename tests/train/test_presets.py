import math

import pytest

from thrifty.errors import ThriftyError
from thrifty.train.presets import PRESETS, preset


def test_fields_are_replaced_and_none_changes_nothing():
    changed = preset("tiny").override(steps=7, hidden_size=128, seed=None)
    assert (changed.recipe.steps, changed.shape.hidden_size, changed.recipe.seed) == (7, 128, 0)
    assert preset("tiny").recipe.steps != 7


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_divide(name):
    shape = preset(name).shape
    assert shape.hidden_size % shape.num_attention_heads == 0
    assert shape.num_attention_heads % shape.num_key_value_heads == 0


def test_the_demo_can_be_exported():
    shape = preset("demo").shape
    assert shape.hidden_size % 256 == 0
    assert shape.intermediate_size % 256 == 0


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ThriftyError, match="no preset is called 'big'; choose one of tiny, demo, small"):
        preset("big")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepz": 3}, "got stepz; did you mean steps?"),
        ({"qqqqqq": 3}, "fields are adam_learning_rate"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"learning_rate": 2.0}, "learning_rate must lie between 0 and 1"),
        ({"adam_learning_rate": math.nan}, "adam_learning_rate must lie between 0 and 1; got nan"),
        ({"momentum": 7.0}, "momentum must be at least 0 and below 1; got 7.0"),
        ({"hold": 1.5}, "hold must be a share from 0 to 1; got 1.5"),
        ({"warmup": -1}, "warmup must be at least 0 and finite; got -1"),
        ({"clip": -1.0}, "clip must be at least 0 and finite; got -1.0"),
        ({"clip": math.inf}, "clip must be at least 0 and finite; got inf"),
        ({"model": "llama"}, "model must be one of bitnet, doge, cheems, matmulfree; got 'llama'"),
        ({"linear": "int4"}, "linear must be one of default, ternary, binary, dense; got 'int4'"),
        ({"sequence_length": 100_000}, "at most the 256 positions"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ThriftyError, match=message.replace("?", r"\?")):
        preset("tiny").override(**fields)
