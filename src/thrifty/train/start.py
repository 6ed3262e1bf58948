"""Beginning with models that are there: one to train on, made low-bit, and one to learn from."""

import copy
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from thrifty.checkpoint import Folder, open_folder
from thrifty.checkpoint.config import read_json
from thrifty.checkpoint.folder import TEXT_FILES
from thrifty.checkpoint.hub import resolve
from thrifty.errors import ThriftyError
from thrifty.models import ThriftyForCausalLM
from thrifty.nn import RMSNorm
from thrifty.train.initial import read_model
from thrifty.train.recipe import Training
from thrifty.train.tokenizer import check_pieces, open_tokenizer, read_tokenizer

#: Norms that are inserted, and the layers that read what they norm.
SUB_NORMS = {"attn_sub_norm": "o_proj", "ffn_sub_norm": "down_proj"}


@dataclass(frozen=True)
class Given:
    """What a run begins with beside its text."""

    #: The model that is trained on; None for a new one.
    start: Folder | None = None
    #: The folder of the model that is learned from.
    teacher: Path | None = None
    #: The tokenizer of these, or one that is given; None for one of the text.
    tokenizer: Tokenizer | None = None
    #: Where a tokenizer that is given lies, and the token that ends its texts.
    texts: Path | None = None
    end: int | None = None

    @property
    def folder(self) -> Path | None:
        """Where the tokenizer lies."""
        return self.texts or (self.teacher if self.start is None else self.start.path)

    def begin_token(self) -> int | None:
        """The token before a text: that of config.json for beginnings, or else for ends; None where all is new."""
        if self.end is not None or self.folder is None:
            return self.end
        fields = read_json(self.folder / "config.json")
        for name in ("bos_token_id", "eos_token_id"):
            value = fields.get(name)
            token = value[0] if isinstance(value, list) and value else value
            if isinstance(token, int):
                return token
        rule = "[train] a model must have a token for the beginning or the end of a text"
        raise ThriftyError(f"{rule}; config.json of {self.folder} has none; give it a bos_token_id")


def open_given(
    start: str | Path | None, teacher: str | Path | None, training: Training, tokenizer: str | Path | None = None
) -> Given:
    """The models that a run begins with, by folder or hub id; of their tensors nothing is read yet.

    tokenizer: one that stands for the start's (`thrifty.train.tokenizer.open_tokenizer`).

    Raises ThriftyError where the tensors of the start are not those of its config (of linears some packed and some
    latent, say), a tokenizer is absent, has pieces that its model has not or is not the other model's, and where
    sequences are longer than positions.
    """
    if (teacher is None) == bool(training.distill_weight or training.relation_weight):
        rule = "[train] a teacher goes with a distill_weight or relation_weight above 0"
        got, way_out = ("a teacher and none of them", "--recipe distill has them")
        if teacher is None:
            got, way_out = ("such a weight and no teacher", "give the teacher's folder by --teacher")
        raise ThriftyError(f"{rule}; got {got}; {way_out}")
    given = Given() if start is None else _open_start(resolve(start), training.sequence_length)
    if tokenizer is not None:
        ours, folder, end = open_tokenizer(tokenizer)
        if given.start is not None:
            check_pieces(ours, tokenizer, given.start.config.vocab_size)
        given = replace(given, tokenizer=ours, texts=folder, end=end)
    return given if teacher is None else _open_teacher(given, resolve(teacher), training.sequence_length)


def _open_start(path: Path, sequence_length: int) -> Given:
    folder = open_folder(path)
    tokenizer = read_tokenizer(path / "tokenizer.json")
    check_pieces(tokenizer, path, folder.config.vocab_size)
    _check_length(path, folder.config.max_position_embeddings, sequence_length)
    return Given(folder, None, tokenizer)


def _open_teacher(given: Given, path: Path, sequence_length: int) -> Given:
    fields, tokenizer = read_json(path / "config.json"), read_tokenizer(path / "tokenizer.json")
    positions = fields.get("max_position_embeddings", fields.get("n_positions", sequence_length))
    _check_length(path, int(positions), sequence_length)
    ours = tokenizer if given.tokenizer is None else given.tokenizer
    if ours.get_vocab() != tokenizer.get_vocab():
        sizes = f"{tokenizer.get_vocab_size()} pieces in {path} and {ours.get_vocab_size()} in the student"
        raise ThriftyError(
            f"[train] teacher and student must have one vocabulary; got {sizes}, not the same; choose a teacher with "
            "the student's tokenizer"
        )
    return replace(given, teacher=path, tokenizer=ours)


def _check_length(path: Path, positions: int, sequence_length: int) -> None:
    if sequence_length > positions:
        rule = f"[train] sequence_length must be at most the {positions} positions of {path}"
        raise ThriftyError(f"{rule}; got {sequence_length}; choose a shorter one")


def copy_texts(source: Path, output: Path) -> None:
    """Copy what a model needs beside tensors and config to read and write text."""
    for name in TEXT_FILES:
        for file in source.glob(name):
            copy = output / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def load_start(folder: Folder, begin_token: int | None) -> ThriftyForCausalLM:
    """The model of a folder as it is, float32, its low-bit linears trainable."""
    model = read_model(folder.path, unpack=True, dtype=torch.float32)
    model.config.bos_token_id = begin_token
    return model


def low_bit_model(model: ThriftyForCausalLM, insert_sub_norms: bool) -> ThriftyForCausalLM:
    """The same parameters in a model whose linears are low-bit: ternary where they are dense.

    insert_sub_norms: put RMSNorms with gain (`SUB_NORMS`; BitDistill, arXiv 2510.13998) before the linears that write
    to the residual stream where there are none. The first model is of no use afterwards.
    """
    config: Any = copy.deepcopy(model.config)
    config.linear = "ternary" if config.linear == "dense" else config.linear
    config.norm_placement = "sub_ln" if insert_sub_norms else config.norm_placement
    changed = (config.linear, config.norm_placement) != (model.config.linear, model.config.norm_placement)
    if not changed:
        return model
    with torch.device("meta"):
        made = type(model)(config)
    made.load_state_dict(model.state_dict(), strict=False, assign=True)
    # What follows from the config is no part of a state dict.
    made.model.rotary_emb = model.model.rotary_emb
    for norm in made.modules():
        if isinstance(norm, RMSNorm) and norm.weight.is_meta:
            norm.weight = nn.Parameter(torch.ones(norm.weight.shape, device=model.device))
    made.tie_weights()
    return made.train(model.training)


@torch.no_grad()
def fit_sub_norms(model: nn.Module, original: nn.Module, tokens: Tensor) -> None:
    """Set the gains of the sub-norms that the original has not: g = sum x^2 / r over sum (x / r)^2, by channel.

    r is what the norm divides a token by. So g x / r is nearest to x, the sum of (g x / r - x)^2 over tokens being
    least: the model starts as near to the original as such norms allow. tokens: [B, T], a sample of the text.
    """
    theirs, sums, hooks = dict(original.named_modules()), {}, []

    def measure(norm: Any, _: nn.Module, inputs: tuple[Tensor]) -> None:
        square = inputs[0].float().square().flatten(0, -2)  # [n, d]
        r = (square.mean(-1, keepdim=True) + norm.eps).sqrt()
        sums[norm] = (square / r).sum(0), (square / r.square()).sum(0)

    for name, norm in model.named_modules():
        block, _, leaf = name.rpartition(".")
        if leaf in SUB_NORMS and name not in theirs:
            reader = theirs[f"{block}.{SUB_NORMS[leaf]}"]
            hooks.append(reader.register_forward_pre_hook(partial(measure, norm)))
    if not hooks:
        return
    training = original.training
    original.eval()(input_ids=tokens, use_cache=False)
    original.train(training)
    for hook in hooks:
        hook.remove()
    for norm, (above, below) in sums.items():
        # A channel that is zero in the sample gets what suits all of them.
        norm.weight.copy_(torch.where(below > 0, above / below, above.sum() / below.sum()))
