"""Presets: the only home of the defaults of training. A preset is a shape and a recipe; options replace fields."""

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from thrifty.errors import ThriftyError

#: Families of models that can be trained, by what their layers mix tokens with.
MODELS = {
    "bitnet": "attention, ternary",
    "doge": "dynamic mask attention",
    "cheems": "SSD, and dynamic mask attention in every eighth layer",
    "matmulfree": "MLGRU, ternary",
}
LINEARS = ("default", "ternary", "binary", "dense")


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder, and what it is made of."""

    #: Pieces of the tokenizer that is trained: 256 bytes, special tokens, merges.
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    #: Longest text, in tokens, that the model is made for.
    max_position_embeddings: int
    #: Base of the rotary positions' wavelengths.
    rope_theta: float = 10_000.0
    #: A key of `MODELS`.
    model: str = "bitnet"
    #: Weights of the linear layers: ternary, binary or dense; default: those of the model.
    linear: str = "default"
    #: Keys that a dynamic mask keeps.
    keep_window_size: int = 64
    #: Experts beside the feed-forward, a square, and how many of them a token takes; 0 for none.
    num_experts: int = 0
    num_experts_per_tok: int = 8


@dataclass(frozen=True)
class Recipe:
    """How the weights are found."""

    #: Optimizer steps.
    steps: int
    #: Sequences in a step.
    batch_size: int
    #: Tokens in a sequence.
    sequence_length: int
    #: Largest learning rate of Muon, for the matrices of the layers.
    learning_rate: float = 1.5e-3
    #: Largest learning rate of Adam, for embedding, head and norms.
    adam_learning_rate: float = 6e-3
    #: Steps over which the learning rates rise from zero.
    warmup: int = 20
    #: Share of the run before they fall.
    hold: float = 0.3
    #: What they fall to at the end, as a share of the largest.
    floor: float = 0.0
    #: Decoupled decay of the matrices of the layers.
    weight_decay: float = 0.0
    #: Momentum of Muon.
    momentum: float = 0.95
    #: Moments of Adam.
    beta1: float = 0.9
    beta2: float = 0.95
    #: Largest norm of the gradient; 0 does not clip.
    clip: float = 0.0
    #: What the output projections of attention and feed-forward are multiplied by at the start.
    output_scale: float = 0.1
    #: Compile the layers for training, where there is a C++ compiler: half a minute, then steps in half the time.
    compile: bool = False
    #: Steps between two looks at the held-out text.
    eval_every: int = 50
    #: Steps between two checkpoints.
    save_every: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Preset:
    """A shape with the recipe that suits it."""

    name: str
    about: str
    shape: Shape
    recipe: Recipe

    def override(self, **options: Any) -> "Preset":
        """The preset with fields of its shape or recipe replaced; options that are None change nothing."""
        given = {name: value for name, value in options.items() if value is not None}
        shape = {f.name for f in fields(Shape)}
        recipe = {f.name for f in fields(Recipe)}
        unknown = sorted(given.keys() - shape - recipe)
        if unknown:
            near = get_close_matches(unknown[0], shape | recipe, 1)
            hint = f"did you mean {near[0]}?" if near else f"fields are {', '.join(sorted(shape | recipe))}"
            raise ThriftyError(f"[preset] a field must be one of the shape or the recipe; got {unknown[0]}; {hint}")
        new = replace(
            self,
            shape=replace(self.shape, **{k: v for k, v in given.items() if k in shape}),
            recipe=replace(self.recipe, **{k: v for k, v in given.items() if k in recipe}),
        )
        _check(new)
        return new


def _check(preset: Preset) -> None:
    shape, recipe = preset.shape, preset.recipe
    for name in ("steps", "batch_size", "sequence_length", "eval_every", "save_every"):
        if getattr(recipe, name) < 1:
            raise ThriftyError(f"[train] {name} must be at least 1; got {getattr(recipe, name)}")
    for name in ("learning_rate", "adam_learning_rate"):
        if not 0 < getattr(recipe, name) < 1:
            raise ThriftyError(f"[train] {name} must lie between 0 and 1; got {getattr(recipe, name)}")
    for name in ("momentum", "beta1", "beta2"):
        if not 0 <= getattr(recipe, name) < 1:
            raise ThriftyError(f"[train] {name} must be at least 0 and below 1; got {getattr(recipe, name)}")
    for name in ("hold", "floor"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise ThriftyError(f"[train] {name} must be a share from 0 to 1; got {getattr(recipe, name)}")
    for name in ("warmup", "weight_decay", "clip", "output_scale", "seed"):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise ThriftyError(f"[train] {name} must be at least 0 and finite; got {getattr(recipe, name)}")
    for name, choices in (("model", tuple(MODELS)), ("linear", LINEARS)):
        if getattr(shape, name) not in choices:
            raise ThriftyError(f"[train] {name} must be one of {', '.join(choices)}; got '{getattr(shape, name)}'")
    if recipe.sequence_length > shape.max_position_embeddings:
        rule = f"[train] sequence_length must be at most the {shape.max_position_embeddings} positions of the model"
        raise ThriftyError(f"{rule}; got {recipe.sequence_length}; choose a shorter one")


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            "0.2 M parameters: seconds, to see that everything works",
            Shape(512, 64, 256, 2, 2, 1, 256),
            Recipe(steps=200, batch_size=8, sequence_length=256, eval_every=50, save_every=100),
        ),
        Preset(
            "demo",
            "5 M parameters: minutes on two cores",
            Shape(2048, 256, 768, 6, 2, 1, 256),
            Recipe(steps=400, batch_size=16, sequence_length=256, compile=True),
        ),
        Preset(
            "small",
            "25 M parameters: hours on a good CPU",
            Shape(8192, 512, 1536, 8, 4, 2, 512),
            Recipe(steps=10_000, batch_size=32, sequence_length=512, compile=True, eval_every=250, save_every=500),
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ThriftyError(f"[preset] no preset is called {name!r}; choose one of {known}")
    return PRESETS[name]
