import dataclasses
import math

import pytest

from thrifty.errors import ThriftyError
from thrifty.train.recipe import find_recipe, recipe_names


def test_fields_are_replaced_and_none_changes_nothing():
    changed = find_recipe("tiny").override(steps=7, hidden_size=128, seed=None)
    assert (changed.training.steps, changed.training.seed) == (7, 0)
    assert changed.shape is not None
    assert changed.shape.hidden_size == 128
    assert find_recipe("tiny").training.steps != 7


@pytest.mark.parametrize("name", recipe_names())
def test_shapes_divide(name):
    shape = find_recipe(name).shape
    if shape is None:
        return
    assert shape.hidden_size % shape.num_attention_heads == 0
    assert shape.num_attention_heads % shape.num_key_value_heads == 0


def test_the_demo_can_be_exported():
    shape = find_recipe("demo").shape
    assert shape is not None
    assert shape.hidden_size % 256 == 0
    assert shape.intermediate_size % 256 == 0


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ThriftyError, match="no recipe is called 'big'; choose one of "):
        find_recipe("big")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepz": 3}, "got stepz; did you mean steps?"),
        ({"qqqqqq": 3}, "fields are accumulate, adam_learning_rate, batch_size"),
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
        ({"clip": "["}, r"clip must be a number; got \["),
        ({"steps": "@"}, "steps must be a whole number; got @"),
        ({"sequence_length": 100_000}, "at most the 256 positions"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ThriftyError, match=message.replace("?", r"\?")):
        find_recipe("tiny").override(**fields)


def write(folder, text):
    file = folder / "own.yaml"
    file.write_text(text)
    return str(file)


GOOD = "method: pretrain\nabout: x\ntraining: {steps: 1, batch_size: 1, sequence_length: 8}\n"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_read_and_says_what_it_is(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert recipe.about
    # What a file says, an option can say.
    assert recipe.override(**dataclasses.asdict(recipe.training)) == recipe


def test_text_is_read_as_the_field_is_annotated():
    training = find_recipe("tiny").override(learning_rate="1e-3", clip="1", compile="true", steps="3").training
    assert (training.learning_rate, training.clip, training.compile, training.steps) == (1e-3, 1.0, True, 3)


def test_a_file_of_ones_own(tmp_path):
    recipe = find_recipe(write(tmp_path, GOOD))
    assert (recipe.name, recipe.shape, recipe.training.steps) == ("own", None, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "must be YAML"),
        ("just words", "must have the sections about, method, shape, training; got str"),
        ("method: pretrain\n", "must have the sections"),
        (GOOD + "training_: {}\n", "got method, about, training, training_"),
        (GOOD.replace("pretrain", "dream"), "method must be one of pretrain.*; got 'dream'"),
        (GOOD.replace("steps", "stepz"), r"got stepz; did you mean steps\?"),
        (GOOD.replace("steps: 1, ", ""), "training must say steps, which has no default"),
        (GOOD.replace("pretrain", "[a]"), r"method must be one of pretrain.*; got \['a'\]"),
        (
            GOOD.replace("{steps: 1, batch_size: 1, sequence_length: 8}", "3"),
            "training must be fields with values; got 3",
        ),
        (GOOD.replace("steps: 1", "steps: many"), "steps must be a whole number; got many"),
        (GOOD.replace("steps: 1", "steps: true"), "steps must be a whole number; got True"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, message):
    with pytest.raises(ThriftyError, match=message):
        find_recipe(write(tmp_path, text))


def test_near_misses_are_named(tmp_path):
    with pytest.raises(ThriftyError, match=r"did you mean demo\?"):
        find_recipe("demos")
    with pytest.raises(ThriftyError, match=r"none.yaml does not exist"):
        find_recipe(str(tmp_path / "none.yaml"))
