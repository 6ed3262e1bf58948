"""Recipes: YAML files that say how a model is trained, and of what shape a new one is; options replace their fields.

A recipe has `about` (a line for a reader), `method` (a key of `METHODS`), `shape` (fields of `Shape`, for methods that
make a new model) and `training` (fields of the method's settings). The settings are the only home of defaults.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from thrifty.errors import ThriftyError

#: Families of models that can be trained, by what their layers mix tokens with.
MODELS = {
    "bitnet": "attention, ternary",
    "doge": "dynamic mask attention",
    "cheems": "SSD, and dynamic mask attention in every eighth layer",
    "matmulfree": "MLGRU, ternary",
}
#: Shapes of the rise of quantisation (`thrifty.train.warmup`).
CURVES = ("linear", "exponential", "sigmoid")
#: What is spread over processes (`thrifty.train.sharding`).
SHARDINGS = ("none", "fsdp", "fsdp-2bit")
LINEARS = ("default", "ternary", "binary", "dense")
#: What can be done with a recipe, and the class of its settings.
METHODS = {
    "pretrain": "thrifty.train.recipe:Training",
    "sft": "thrifty.train.recipe:Tuning",
    "dpo": "thrifty.train.recipe:Tuning",
}
#: Recipes that come with the package.
FOLDER = Path(__file__).parent / "recipes"


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

    def __post_init__(self) -> None:
        check_choice(self, "model", MODELS)
        check_choice(self, "linear", LINEARS)


@dataclass(frozen=True)
class Training:
    """How the weights of a language model are found from text."""

    #: Optimizer steps.
    steps: int
    #: Sequences in a step, of all processes together.
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
    #: Share of the run that is its first stage; 1: there is no second.
    first_stage: float = 1.0
    #: What the learning rates fall to by the end of the first stage, and what the second begins with, as shares.
    first_floor: float = 0.5
    second_rate: float = 0.33
    #: Decoupled decay of the matrices of the layers, in the first stage.
    weight_decay: float = 0.0
    #: Momentum of Muon.
    momentum: float = 0.95
    #: Moments of Adam.
    beta1: float = 0.9
    beta2: float = 0.95
    #: Largest norm of the gradient; 0 does not clip.
    clip: float = 0.0
    #: What the output projections of attention and feed-forward of a new model are multiplied by.
    output_scale: float = 0.1
    #: Share of the run over which quantisation rises from none to all; 0: all of it counts from the first step.
    quantization_warmup: float = 0.0
    #: How it rises, a key of `CURVES`, and how steeply where that is no straight line.
    quantization_curve: str = "linear"
    quantization_steepness: float = 10.0
    #: Put norms before the output projections of a start model that has none.
    insert_sub_norms: bool = False
    #: What a teacher's distribution of the next token weighs beside the text, and the temperature of both.
    distill_weight: float = 0.0
    distill_temperature: float = 1.0
    #: What relations of tokens weigh, and the layer they are taken of, from the end of both models (-1: the last).
    relation_weight: float = 0.0
    relation_layer: int = -1
    #: Keep documents that share a sequence apart: none sees another.
    document_mask: bool = False
    #: Compile the layers for training, where there is a C++ compiler: half a minute, then steps in half the time.
    compile: bool = False
    #: Parts in which a process computes its sequences of a step, one after the other, where memory is short.
    accumulate: int = 1
    #: What processes share out beside the batch: none; fsdp: parameters, gradients and optimizer state; fsdp-2bit: the
    #: same, and of ternary weights only codes are gathered.
    sharding: str = "none"
    #: Steps between two looks at the held-out text.
    eval_every: int = 50
    #: Steps between two checkpoints.
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "sequence_length", "accumulate", "eval_every", "save_every")
        check(self, "be at least 1", lambda count: count >= 1, *counts)
        check(self, "lie between 0 and 1", lambda rate: 0 < rate < 1, "learning_rate", "adam_learning_rate")
        check(self, "be at least 0 and below 1", lambda moment: 0 <= moment < 1, "momentum", "beta1", "beta2")
        check_choice(self, "sharding", SHARDINGS)
        shares = ("hold", "floor", "first_stage", "first_floor", "second_rate")
        check(self, "be a share from 0 to 1", lambda share: 0 <= share <= 1, *shares)
        sizes = ("warmup", "weight_decay", "clip", "output_scale", "seed", "distill_weight", "relation_weight")
        check(self, "be at least 0 and finite", lambda size: 0 <= size < math.inf, *sizes)
        check(self, "end before the run does, at a share below 1", lambda share: 0 <= share < 1, "quantization_warmup")
        check_choice(self, "quantization_curve", CURVES)
        positive = ("quantization_steepness", "distill_temperature")
        check(self, "be above 0 and finite", lambda size: 0 < size < math.inf, *positive)
        check(self, "count layers from the end, -1 for the last", lambda layer: layer < 0, "relation_layer")
        if self.sharding == "fsdp-2bit" and self.quantization_warmup:
            rule = "[train] quantisation must not warm up where only codes are gathered"
            raise ThriftyError(f"{rule}; got {self.quantization_warmup} of the run; choose sharding=fsdp")
        if self.hold > self.first_stage:
            rule = f"[train] hold must end before the first stage does, at {self.first_stage}"
            raise ThriftyError(f"{rule}; got {self.hold}; hold the learning rates for a smaller share")


@dataclass(frozen=True)
class Tuning:
    """How a model that is there is tuned: on answers (sft), or on which of two answers is preferred (dpo)."""

    #: Rows in a step.
    batch_size: int
    #: Tokens in a row; what is longer is cut.
    sequence_length: int
    #: Times that the rows are read, and, where it is not 0, the number of optimizer steps instead.
    epochs: float = 1.0
    steps: int = 0
    #: Largest learning rate of AdamW; it falls to zero along a cosine.
    learning_rate: float = 2e-5
    #: Steps over which it rises from zero.
    warmup: int = 10
    #: Decoupled weight decay.
    weight_decay: float = 0.0
    #: Largest norm of the gradient; 0 does not clip.
    clip: float = 1.0
    #: dpo: how much a change of the model counts as preference, and so how far it moves (arXiv 2305.18290, eq. 7).
    beta: float = 0.1
    #: sft: put several short rows into one sequence, where none sees another.
    packing: bool = False
    #: Rank of low-rank adapters beside packed layers, which are trained instead of the weights; 0 trains the weights.
    lora_rank: int = 0
    #: What adapters are multiplied by, times their rank.
    lora_alpha: float = 32.0
    #: Share of an adapter's inputs that is dropped.
    lora_dropout: float = 0.0
    #: Layers with adapters, by the last parts of their names, with commas between; all: all linear ones.
    lora_targets: str = "all"
    #: Adapters change codes, as merging them does, which then loses nothing; else they add to the products of the base.
    lora_requantized: bool = False
    #: Recompute activations in the backward: less memory, a third more time.
    gradient_checkpointing: bool = False
    #: Steps between two looks at the held-out rows.
    eval_every: int = 50
    #: Steps between two checkpoints.
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, "be at least 1", lambda n: n >= 1, "batch_size", "sequence_length", "eval_every", "save_every")
        check(self, "lie between 0 and 1", lambda rate: 0 < rate < 1, "learning_rate")
        check(self, "be at least 0 and below 1", lambda share: 0 <= share < 1, "lora_dropout")
        check(self, "be above 0 and finite", lambda size: 0 < size < math.inf, "epochs", "beta", "lora_alpha")
        sizes = ("steps", "warmup", "weight_decay", "clip", "lora_rank", "seed")
        check(self, "be at least 0 and finite", lambda size: 0 <= size < math.inf, *sizes)


@dataclass(frozen=True)
class Recipe:
    """A method with its settings, and the shape of the model where the method makes one."""

    name: str
    about: str
    method: str
    #: None where the model is given.
    shape: Shape | None
    #: A `Training` or a `Tuning`, as the method has it.
    training: Any

    def __post_init__(self) -> None:
        if self.shape is not None and self.training.sequence_length > self.shape.max_position_embeddings:
            limit = self.shape.max_position_embeddings
            rule = f"[train] sequence_length must be at most the {limit} positions of the model"
            raise ThriftyError(f"{rule}; got {self.training.sequence_length}; choose a shorter one")

    def override(self, **options: Any) -> "Recipe":
        """The recipe with fields of its shape or settings replaced; options that are None change nothing.

        Numbers and switches may be given as text. Raises ThriftyError for a field there is not, or a bad value.
        """
        given = {name: value for name, value in options.items() if value is not None}
        parts = {"training": self.training} | ({} if self.shape is None else {"shape": self.shape})
        names = {field.name: key for key, part in parts.items() for field in fields(part)}
        check_names(given, names, f"the recipe {self.name}")
        for key, part in parts.items():
            mine = {name: value for name, value in given.items() if names[name] == key}
            parts[key] = replace(part, **typed(type(part), mine))
        return replace(self, **parts)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or in that YAML file.

    Errors: no such recipe, a file that is no recipe, a field there is not (the nearest one is named), a bad value.
    """
    own = name.endswith((".yaml", ".yml"))
    file = Path(name) if own else FOLDER / f"{name}.yaml"
    if not file.is_file():
        if own:
            known = ", ".join(recipe_names())
            raise ThriftyError(f"[recipe] {file} does not exist; give a YAML file, or one of {known}")
        near = get_close_matches(name, recipe_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(recipe_names())}, or a .yaml file"
        raise ThriftyError(f"[recipe] no recipe is called {name!r}; {hint}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())
        raise ThriftyError(f"[recipe] {file} must be YAML; {reason}; see {FOLDER / 'demo.yaml'}") from problem
    return _read(file, content)


def _read(file: Path, content: Any) -> Recipe:
    sections = {field.name for field in fields(Recipe)} - {"name"}
    if not isinstance(content, dict) or not sections >= content.keys() or not {"method", "training"} <= content.keys():
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ThriftyError(f"[recipe] {file} must have the sections {', '.join(sorted(sections))}; got {got}")
    if str(content["method"]) not in METHODS:
        raise ThriftyError(f"[recipe] method must be one of {', '.join(METHODS)}; got {content['method']!r} in {file}")
    module, _, name = METHODS[content["method"]].partition(":")
    kinds: dict[str, Any] = {"shape": Shape, "training": getattr(import_module(module), name)}
    parts: dict[str, Any] = {"shape": None}
    for key, kind in kinds.items():
        if key not in content:
            continue
        values = content[key] or {}
        if not isinstance(values, dict):
            raise ThriftyError(f"[recipe] {key} must be fields with values; got {values!r} in {file}")
        check_names(values, [field.name for field in fields(kind)], f"{key} in {file}")
        needed = [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]
        if needed:
            raise ThriftyError(f"[recipe] {key} must say {', '.join(needed)}, which has no default; {file} does not")
        parts[key] = kind(**typed(kind, values))
    return Recipe(file.stem, str(content.get("about", "")), content["method"], **parts)


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ThriftyError for a name that is not known, with the nearest one that is."""
    known = sorted(known)
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"fields are {', '.join(known)}"
            raise ThriftyError(f"[recipe] a field must be one of {where}; got {name}; {hint}")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def typed(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the fields of the dataclass are annotated; text is read as YAML. Raises ThriftyError otherwise."""
    hints = get_type_hints(kind)
    return {name: _typed(name, hints[name], value) for name, value in values.items()}


def _typed(name: str, kind: type, value: Any) -> Any:
    read = value
    if isinstance(value, str) and kind is not str:
        # What is no YAML is no number either.
        with suppress(yaml.YAMLError):
            read = yaml.safe_load(value)
    if kind is float and not isinstance(read, bool):
        # YAML takes 1e-3 for text, for want of a point.
        with suppress(TypeError, ValueError):
            read = float(read)
    if kind in _WORDS and type(read) is not kind:
        raise ThriftyError(f"[recipe] {name} must be {_WORDS[kind]}; got {value}")
    return read


def check(settings: Any, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises ThriftyError where the rule does not hold for one of the fields."""
    for name in names:
        if not holds(getattr(settings, name)):
            raise ThriftyError(f"[train] {name} must {rule}; got {getattr(settings, name)}")


def check_choice(settings: Any, name: str, choices: Iterable[str]) -> None:
    """Raises ThriftyError where the field is none of the choices."""
    if getattr(settings, name) not in choices:
        raise ThriftyError(f"[train] {name} must be one of {', '.join(choices)}; got '{getattr(settings, name)}'")
