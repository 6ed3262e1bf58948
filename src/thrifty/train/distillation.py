"""Learning from a teacher: its distribution of the next token, and how the tokens relate in one of its layers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from thrifty.checkpoint.config import read_json
from thrifty.errors import ThriftyError
from thrifty.models import ThriftyForCausalLM
from thrifty.models.configuration import FAMILIES, OTHERS
from thrifty.train.recipe import Training

#: Linears that read a mixer's input, by the mixer.
PROJECTIONS = {
    "attention": ("q_proj", "k_proj", "v_proj"),
    "dynamic_mask": ("q_proj", "k_proj", "v_proj"),
    "mlgru": ("f_proj", "c_proj", "g_proj"),
    "ssd": ("x_proj", "b_proj", "c_proj"),
}
#: Logits that are looked at together: 16 MB of each of a few copies.
CHUNK = 1 << 22


def load_teacher(path: Path, bf16: bool) -> PreTrainedModel:
    """A model to learn from, by this package's loader or transformers' own: evaluated, and never changed.

    bf16: its tensors may be of that dtype, where the folder's are; else they are float32.
    """
    own = read_json(path / "config.json").get("model_type") in (*FAMILIES, *OTHERS)
    loader: Any = ThriftyForCausalLM if own else AutoModelForCausalLM
    return loader.from_pretrained(path, dtype="auto" if bf16 else torch.float32).eval().requires_grad_(False)


class Distillation:
    """What a teacher adds to the loss: distill_weight * t^2 KL(teacher || student, both at temperature t), a token, and
    relation_weight * `relation_kl` of the linears that read the mixer's input in one layer.

    t^2 keeps the size of the gradient whatever the temperature is (Hinton et al., arXiv 1503.02531). Relations are left
    out, and `why_no_relations` says why, where the layers mix tokens in different ways. bf16: the teacher computes in
    it, as the student does. `close` takes the hooks off the models.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, training: Training, bf16: bool = False
    ) -> None:
        self.teacher, self.training, self.bf16 = teacher, training, bf16
        self.why_no_relations: str | None = None
        self._taps: list[Tap] = []
        self._sums: dict[str, Tensor] = {}
        self._calls = 0
        if not training.relation_weight:
            return
        ours, theirs = (mixer_of(model, training.relation_layer) for model in (student, teacher))
        if ours is None or theirs is None or ours[0] != theirs[0]:
            kinds = " and ".join("unknown" if found is None else found[0] for found in (ours, theirs))
            self.why_no_relations = f"student and teacher mix tokens in different ways ({kinds})"
            return
        self._heads = relation_heads(student, [*ours[1], *theirs[1]])
        self._taps = [Tap(linear) for linear in (*ours[1], *theirs[1])]

    def loss(self, inputs: Mapping[str, Tensor], logits: Tensor, count: Tensor | int | None = None) -> Tensor:
        """To be added to the loss on the text. logits: the student's, [B, T, V]; count: of the tokens predicted in the
        whole step, by default those of these inputs."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if self.teacher.device != logits.device:
            self.teacher.to(logits.device)  # pyright: ignore[reportArgumentType]
        with torch.no_grad(), torch.autocast(logits.device.type, torch.bfloat16, enabled=self.bf16):
            theirs = self.teacher(**given, use_cache=False).logits
        kept = F.pad(inputs["labels"][:, 1:] != -100, (0, 1))  # [B, T]
        share = 1.0 if count is None else kept.sum() / count
        size = min(logits.shape[-1], theirs.shape[-1])  # beyond the vocabulary there may be padding
        kl = distillation_kl(logits[..., :size], theirs[..., :size], kept, self.training.distill_temperature)
        parts = {"teacher_loss": self.training.distill_weight * share * kl}
        if self._taps:
            outputs = [tap.take() for tap in self._taps]
            pairs = zip(outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :], strict=True)
            relations = [relation_kl(mine, other, self._heads) for mine, other in pairs]
            parts["relation_loss"] = self.training.relation_weight * share * torch.stack(relations).mean()
        self._calls += 1
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0) + part.detach()
        return torch.stack(list(parts.values())).sum()

    def report(self, calls_in_step: int = 1) -> dict[str, float]:
        """The weighted parts of the loss of a step, by the names they are logged under: means since the last report."""
        means = {name: total.item() * calls_in_step / self._calls for name, total in self._sums.items()}
        self._sums, self._calls = {}, 0
        return means

    def close(self) -> None:
        """Take the hooks off the models."""
        for tap in self._taps:
            tap.hook.remove()


class Tap:
    """Keeps the newest output of a layer, until it is taken."""

    def __init__(self, layer: nn.Module) -> None:
        self.output: Tensor | None = None
        self.hook = layer.register_forward_hook(self._keep)

    def take(self) -> Tensor:
        """What the layer gave at last."""
        output, self.output = self.output, None
        if output is None:
            raise RuntimeError("[distillation] the layer was not called")
        return output

    def _keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.output = output


def mixer_of(model: PreTrainedModel, layer: int) -> tuple[str, list[Any]] | None:
    """The kind of mixer in a layer, and the linears that read its input; None where that is not known.

    Raises ThriftyError where there is no such layer.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        return None
    if not -len(layers) <= layer < 0:
        rule = f"[train] relation_layer must count layers from the end, -1 to -{len(layers)}"
        raise ThriftyError(f"{rule}; got {layer}")
    mixer = getattr(layers[layer], "self_attn", None)
    config: Any = model.config
    kind = config.mixer(len(layers) + layer) if isinstance(model, ThriftyForCausalLM) else "attention"
    linears = [getattr(mixer, name, None) for name in PROJECTIONS[kind]]
    return None if None in linears else (kind, linears)


def relation_heads(student: PreTrainedModel, linears: list[Any]) -> int:
    """Parts that outputs are split in: the student's kv heads where they divide all widths, else one."""
    heads = int(student.config.num_key_value_heads)
    return heads if all(linear.out_features % heads == 0 for linear in linears) else 1


def distillation_kl(student: Tensor, teacher: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """t^2 mean over kept of KL(softmax(teacher / t) || softmax(student / t)), in float32.

    student, teacher: logits [..., V]; kept: bool [...], the rows that count. Differentiable in the student's logits:
    t (softmax(student / t) - softmax(teacher / t)) a row. No copy of either is kept for that.
    """
    loss: Any = _KL.apply(student.flatten(0, -2), teacher.flatten(0, -2), kept.flatten(), temperature)
    return loss


class _KL(torch.autograd.Function):
    """Some rows at a time, anew in the backward: softmaxes of a large vocabulary dwarf everything else in memory."""

    @staticmethod
    def forward(ctx, student, teacher, kept, temperature):
        ctx.save_for_backward(student, teacher, kept)
        ctx.temperature = temperature
        total = torch.zeros((), device=student.device)
        for rows in _chunks(student):
            ours = (student[rows].float() / temperature).log_softmax(-1)
            theirs = (teacher[rows].float() / temperature).log_softmax(-1)
            total += (F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * kept[rows]).sum()
        return total * temperature**2 / kept.sum().clamp(min=1)

    @staticmethod
    def backward(ctx, grad):
        student, teacher, kept = ctx.saved_tensors
        scale = grad * ctx.temperature * kept / kept.sum().clamp(min=1)
        result = torch.empty_like(student)
        for rows in _chunks(student):
            ours = (student[rows].float() / ctx.temperature).softmax(-1)
            theirs = (teacher[rows].float() / ctx.temperature).softmax(-1)
            result[rows] = scale[rows, None] * (ours - theirs)
        return result, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK // logits.shape[-1])
    return [slice(first, first + size) for first in range(0, logits.shape[0], size)]


def relation_kl(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """Mean over tokens and heads of KL(R(teacher) || R(student)), R(a) = softmax(a a^T / sqrt(d)), in float32.

    student, teacher: [B, T, heads * d], d of each its own: what a token has in common with each other one, whatever the
    widths (MiniLMv2, arXiv 2012.15828, section 3; BitDistill, arXiv 2510.13998). One sequence is held at a time.
    """
    parts = [
        checkpoint(_relation_kl, mine, other, heads, use_reentrant=False, preserve_rng_state=False)
        for mine, other in zip(student, teacher.detach(), strict=True)
    ]
    return torch.stack(parts).mean()


def _relation_kl(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    ours, theirs = (_relations(states, heads) for states in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


def _relations(states: Tensor, heads: int) -> Tensor:
    """log R of one sequence [T, heads * d]: [heads, T, T]."""
    split = states.float().unflatten(-1, (heads, -1)).transpose(0, 1)  # [heads, T, d]
    return (split @ split.mT / math.sqrt(split.shape[-1])).log_softmax(-1)
