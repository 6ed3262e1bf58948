"""The optimizer of a run: Muon for the matrices of the layers, Adam for everything else; and the learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.train.recipe import Training
from thrifty.train.shards import is_sharded, local, spread


def build_optimizer(model: nn.Module, training: Training) -> "MuonWithAdam":
    """Muon over the weight matrices between embedding and head, Adam over embedding, head, norms and biases."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(parameter)
    return MuonWithAdam(
        [
            {"params": matrices, "muon": True, "lr": training.learning_rate},
            {"params": others, "muon": False, "lr": training.adam_learning_rate, "weight_decay": 0.0},
        ],
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        betas=(training.beta1, training.beta2),
    )


class MuonWithAdam(torch.optim.Optimizer):
    """Groups with `muon` step along orthogonalised momentum, the others by Adam; both decay weights decoupled.

    Muon (Jordan et al., 2024; https://kellerjordan.github.io/posts/muon): m ← μ m + (1 - μ) g, u = (1 - μ) g + μ m
    after it, and w ← w (1 - lr λ) - lr √max(rows, columns) · O(u), where O maps the singular values of u to about one.
    The root makes an entry of the step about `lr` in size, whatever the shape, as Adam's is.
    """

    def __init__(self, params: Iterable[Any], weight_decay: float, momentum: float, betas: tuple[float, float]):
        defaults = {"weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": 1e-8, "steps": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One step on the gradients that are there; `closure` recomputes them, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            given = [p for p in group["params"] if p.grad is not None]
            if group["weight_decay"]:
                for p in given:
                    local(p).mul_(1 - group["lr"] * group["weight_decay"])
            (self._muon if group["muon"] else self._adam)(group, given)
        return loss

    def _muon(self, group: dict[str, Any], given: list[Tensor]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for p in given:
            alike.setdefault((min(p.shape), max(p.shape)), []).append(p)
        # Matrices of one shape are orthogonalised together: a few large products beat many small ones.
        for (_, longer), members in alike.items():
            updates = [self._update(p, group["momentum"]) for p in members]
            directions = (
                orthogonalize_shards(updates, members) if is_sharded(members[0]) else orthogonalize_all(updates)
            )
            for p, direction in zip(members, directions, strict=True):
                local(p).add_(direction.float(), alpha=-group["lr"] * math.sqrt(longer))

    def _update(self, p: Tensor, momentum: float) -> Tensor:
        """What is orthogonalised, in bfloat16, as it will be computed with."""
        state, gradient = self.state[p], local(p.grad)
        if not state:
            state["momentum"] = torch.zeros_like(p)
        buffer = local(state["momentum"]).lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, buffer, momentum).to(torch.bfloat16)

    def _adam(self, group: dict[str, Any], given: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1 ** group["steps"], 1 - beta2 ** group["steps"]
        for p in given:
            state, gradient = self.state[p], local(p.grad)
            if not state:
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            mean = local(state["mean"]).lerp_(gradient, 1 - beta1)
            square = local(state["square"]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (square / correction2).sqrt_().add_(group["eps"])
            local(p).addcdiv_(mean, root, value=-group["lr"] / correction1)


def orthogonalize_all(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalize` of matrices of one shape, or of that shape turned."""
    wide = [m if m.shape[0] <= m.shape[1] else m.T for m in matrices]
    directions = orthogonalize(torch.stack(wide))
    return [d if m.shape[0] <= m.shape[1] else d.T for m, d in zip(matrices, directions, strict=True)]


def orthogonalize_shards(rows: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """`orthogonalize_all` of matrices whose rows are spread over processes; each process works on its share of them.

    rows: those that this process has of each matrix; parameters: their parameters, sharded by rows. Returns the same
    rows of the results. What travels is bfloat16, which the result is computed and given in anyhow.
    """
    mesh: Any = parameters[0].device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    return spread(rows, [tuple(p.shape) for p in parameters], orthogonalize_all, mesh.get_group())


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values between 0.7 and 1.2. [k, rows ≤ columns], bf16.

    Five Newton-Schulz steps X ← a X + (b S + c S²) X, S = X Xᵀ, on X scaled to norm one, with Jordan's coefficients.
    """
    x = matrices.to(torch.bfloat16)
    x = x / (x.float().flatten(1).norm(dim=1)[:, None, None] + 1e-7).to(torch.bfloat16)
    for _ in range(5):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def learning_rate_factor(step: int, steps: float, training: Training) -> float:
    """Share of the largest learning rate at `step` (from 0) of `steps`.

    A straight rise over `warmup` steps, times, with p = step / steps: 1 while p < hold, then straight down to `floor`
    at p = 1. With two stages (arXiv 2504.12285, section 3.1): straight down to `first_floor` at p = first_stage, then
    from `second_rate` to `floor`.
    """
    rise = min(1.0, (step + 1) / max(training.warmup, 1))
    p = min(step / steps, 1.0)
    if p >= training.first_stage < 1:
        return rise * _line(p, (training.first_stage, training.second_rate), (1.0, training.floor))
    end = training.floor if training.first_stage == 1 else training.first_floor
    return rise * _line(p, (training.hold, 1.0), (training.first_stage, end))


def _line(p: float, begin: tuple[float, float], end: tuple[float, float]) -> float:
    """Height at p of the line between two points; before the first, the first's."""
    share = max(p - begin[0], 0.0) / max(end[0] - begin[0], 1e-9)
    return begin[1] + (end[1] - begin[1]) * min(share, 1.0)


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """`learning_rate_factor` of every group, and weight decay that ends with the first stage."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, training: Training) -> None:
        self.training, self.steps = training, steps
        super().__init__(optimizer, lambda step: learning_rate_factor(step, steps, training))

    def step(self, *args: Any) -> None:
        super().step(*args)
        if self.last_epoch >= self.training.first_stage * self.steps:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 0.0

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        del state["training"]
        return state
