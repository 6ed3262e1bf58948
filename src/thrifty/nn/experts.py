"""Layers of experts by the million, found by product keys."""

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty import native, ops
from thrifty.errors import ThriftyError
from thrifty.nn.linear import ExactLinear, Linear, Norm, is_exact, make_linear
from thrifty.nn.norm import RMSNorm
from thrifty.ops import evaluation

Router = Literal["product_key_heads", "linear"]
ROUTERS = ("product_key_heads", "linear")
RouterLayout = Literal["per_token", "legacy"]
ROUTER_LAYOUTS = ("per_token", "legacy")

_ACTIVATION_NAMES: dict[Any, str] = {nn.GELU: "gelu", nn.SiLU: "silu", nn.ReLU: "relu"}


class ExpertUsage(NamedTuple):
    """How a layer's experts were used: the share ever chosen, and the entropy of the choices over that of even use."""

    share: float
    entropy: float


class CDMoE(nn.Module):
    """y = down(act(gate x) * up x) + sum_k w_k act(x . d_k) u_k: a shared gated MLP and k of n experts (2412.11834).

    x: [..., d_model] -> [..., d_model]. An expert is one hidden unit, the rows d_e of `down_embed` and u_e of
    `up_embed`, chosen by the sum of two scores (`thrifty.ops.product_key_topk`), w the softmax over the chosen sums of
    a head. router="product_key_heads" (WonderfulMatrices) has `queries` of n_experts_heads heads against `keys`
    [heads, sqrt n, 2, r / 2]; "linear" (transformers' Doge) has one head, `router_gate` [2 sqrt n, d_model].

    d_cd and d_expert_retrieval are other names of d_ff and d_private_expert_retrieval. router_layout="legacy" splits
    the linear router's scores as transformers does, across tokens and sequences: not causal, for published checkpoints
    only. norm_topk_prob divides by the sum over all heads. weight, norm: of the shared MLP's layers, as for
    `BitFeedForward`; router and experts stay dense. sparse_grad: as for `thrifty.ops.product_key_experts`.
    track_usage counts the choices for `usage()`. Raises ThriftyError for sizes that do not fit and unknown options.
    """

    expert_counts: Tensor | None

    def __init__(
        self,
        d_model: int,
        act_fn: str = "silu",
        d_ff: int | None = None,
        d_private_expert_retrieval: int | None = None,
        n_experts: int = 16384,
        n_experts_heads: int = 1,
        n_experts_per_head: int = 64,
        *,
        d_cd: int | None = None,
        d_expert_retrieval: int | None = None,
        router: Router = "product_key_heads",
        router_layout: RouterLayout = "per_token",
        norm_topk_prob: bool = False,
        bias: bool = True,
        weight: Linear = "dense",
        norm: Norm = "rms",
        sparse_grad: bool = False,
        track_usage: bool = False,
    ) -> None:
        super().__init__()
        ops.activation(act_fn)
        hidden = _one_of("d_ff", d_ff, "d_cd", d_cd, 2 * d_model)
        retrieval = _one_of(
            "d_private_expert_retrieval", d_private_expert_retrieval, "d_expert_retrieval", d_expert_retrieval, 64
        )
        n_keys = check_experts("CDMoE", "n_experts", n_experts, "n_experts_per_head", n_experts_per_head)
        _check_router(router, router_layout, n_experts_heads, retrieval)
        self.activation, self.router, self.router_layout = act_fn, router, router_layout
        self.heads, self.n_keys, self.per_head = n_experts_heads, n_keys, n_experts_per_head
        self.norm_topk_prob, self.sparse_grad, self.kind = norm_topk_prob, sparse_grad, weight
        self.gate_proj = make_linear(weight, d_model, hidden, bias, norm)
        self.up_proj = make_linear(weight, d_model, hidden, bias, norm)
        self.down_proj = make_linear(weight, hidden, d_model, bias, norm)
        router_linear = nn.Linear if weight == "dense" else ExactLinear
        if router == "linear":
            self.router_gate = router_linear(d_model, 2 * n_keys, bias=False)
        else:
            self.queries = router_linear(d_model, n_experts_heads * retrieval, bias=False)
            self.keys = product_keys(n_experts_heads, n_keys, retrieval // 2)
        self.down_embed, self.up_embed = expert_table(n_experts, d_model), expert_table(n_experts, d_model)
        counts = torch.zeros(n_experts, dtype=torch.int64) if track_usage else None
        self.register_buffer("expert_counts", counts, persistent=False)

    def forward(self, x: Tensor, output_router_logits: bool = False) -> Any:
        """y, or, with output_router_logits, (y, scores [2, tokens * heads, sqrt n] for `load_balance_loss`)."""
        scores = self.router_scores(x)
        shared = self.down_proj(ops.glu(self.gate_proj(x), self.up_proj(x), self.activation))
        y = shared + self.experts(x, scores)
        return (y, scores.flatten(1, 2)) if output_router_logits else y

    def router_scores(self, x: Tensor) -> Tensor:
        """Scores [2, tokens, heads, sqrt n] of both halves of a key. x: [..., d_model]."""
        if self.router == "product_key_heads":
            score = evaluation.product_key_scores if self._exact(x) else product_key_scores
            return score(self.queries(x), self.keys)
        logits = self.router_gate(x)
        if self.router_layout == "legacy":
            return logits.reshape(2, -1, 1, self.n_keys)
        return logits.reshape(-1, 2, 1, self.n_keys).transpose(0, 1)

    def experts(self, x: Tensor, scores: Tensor) -> Tensor:
        """The routed part of y, [..., d_model], by scores from `router_scores`."""
        tables = self.down_embed.weight, self.up_embed.weight
        counted = self.expert_counts is not None
        if self._exact(x) and self.per_head <= evaluation.MOST_CHOSEN and not counted:
            return evaluation.routed_experts(x, scores, *tables, self.per_head, self.activation, self.norm_topk_prob)
        weights, indices = retrieve(scores, self.per_head)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.expert_counts is not None:
            self.expert_counts += torch.bincount(indices.flatten(), minlength=len(self.expert_counts))
        rows = x.reshape(-1, x.shape[-1])
        return ops.product_key_experts(rows, indices, weights, *tables, self.activation, self.sparse_grad).view(x.shape)

    def _exact(self, x: Tensor) -> bool:
        return self.kind != "dense" and is_exact(x)

    def usage(self) -> ExpertUsage:
        """Use of the experts since the layer was made. Raises ThriftyError unless track_usage was set."""
        if self.expert_counts is None:
            raise ThriftyError("[CDMoE] uses are not counted; make the layer with track_usage=True")
        counts = self.expert_counts.double()
        shares = counts[counts > 0] / counts.sum()
        even = math.log(max(2, len(counts)))
        return ExpertUsage(len(shares) / len(counts), float(-(shares * shares.log()).sum() / even))

    def extra_repr(self) -> str:
        return (
            f"n_experts={self.n_keys**2}, heads={self.heads}, per_head={self.per_head}, router={self.router!r}, "
            f"activation={self.activation!r}"
        )


class PEER(nn.Module):
    """y = sum_h sum_k w_hk act(x . d_hk) u_hk: experts of one hidden unit, by heads with queries (arXiv 2407.04153).

    x: [B, T, dim] -> [B, T, dim]. Each of `heads` chooses num_experts_per_head of num_experts by product keys of width
    dim_key a half (dim // 2 unless given); w is the softmax over a head's choices, with dropout.
    separate_embed_per_head gives each head experts of its own. pre_rmsnorm: an RMSNorm with gain first. activation: a
    key of `thrifty.ops.ACTIVATIONS`, or nn.GELU, nn.SiLU, nn.ReLU. Retrieval is exact, so product_key_topk, if given,
    only has to be num_experts_per_head or more. Raises ThriftyError for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        num_experts: int = 1_000_000,
        num_experts_per_head: int = 16,
        activation: str | type[nn.Module] = nn.GELU,
        dim_key: int | None = None,
        product_key_topk: int | None = None,
        separate_embed_per_head: bool = False,
        pre_rmsnorm: bool = False,
        dropout: float = 0.0,
        *,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        n_keys = check_experts("PEER", "num_experts", num_experts, "num_experts_per_head", num_experts_per_head)
        if product_key_topk is not None and product_key_topk < min(num_experts_per_head, n_keys):
            raise ThriftyError(
                f"[PEER] product_key_topk must be at least num_experts_per_head {num_experts_per_head}, for retrieval "
                f"to be exact; got {product_key_topk}; leave it out"
            )
        self.activation = (
            activation if isinstance(activation, str) else _ACTIVATION_NAMES.get(activation, str(activation))
        )
        ops.activation(self.activation)
        self.per_head, self.num_experts, self.dropout, self.sparse_grad = (
            num_experts_per_head,
            num_experts,
            dropout,
            sparse_grad,
        )
        self.separate_embed_per_head = separate_embed_per_head
        dim_key = dim // 2 if dim_key is None else dim_key
        self.norm = RMSNorm(dim) if pre_rmsnorm else None
        self.to_queries = nn.Sequential(nn.Linear(dim, dim_key * heads * 2, bias=False))
        self.keys = product_keys(heads, n_keys, dim_key)
        rows = num_experts * (heads if separate_embed_per_head else 1)
        self.weight_down_embed, self.weight_up_embed = expert_table(rows, dim), expert_table(rows, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        weights, indices = retrieve(product_key_scores(self.to_queries(x), self.keys), self.per_head)
        if self.separate_embed_per_head:
            heads = torch.arange(len(self.keys), device=x.device) * self.num_experts
            indices = indices + heads.repeat_interleave(self.per_head)
        weights = F.dropout(weights, self.dropout, self.training)
        tables = self.weight_down_embed.weight, self.weight_up_embed.weight
        rows = x.reshape(-1, x.shape[-1])
        return ops.product_key_experts(rows, indices, weights, *tables, self.activation, self.sparse_grad).view(x.shape)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, per_head={self.per_head}, activation={self.activation!r}"


def product_key_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """s_phj = q_ph . k_hjp, the scores [2, tokens, heads, n] of both halves p.

    queries: [..., 2 * heads * r], p varying slowest; keys: [heads, n, 2, r].
    """
    heads, _, _, r = keys.shape
    return torch.einsum("tphr,hkpr->pthk", queries.reshape(-1, 2, heads, r), keys.to(queries.dtype))


def retrieve(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of each head with the best sums of two scores. scores: [2, tokens, heads, n].

    Returns weights, the softmax over a head's k sums, and expert numbers, both [tokens, heads * k].
    """
    sums, indices = ops.product_key_topk(scores[0], scores[1], k)
    return sums.softmax(-1).flatten(1), indices.flatten(1)


def load_balance_loss(router_logits: Tensor | Iterable[Tensor], k: int, mask: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e: f_e the share of choices that went to expert e, P_e its mean probability (arXiv 2101.03961).

    router_logits: [2, rows, n] of a layer with E = n^2 experts, or several layers', over which f and P are means; k:
    choices per row. mask: bool [B, T], False at padding, rows being tokens in order (each with its heads). 1 where all
    is even. A softmax over sums of two scores is the product of two softmaxes, so P is one [n, rows] x [rows, n]
    product: nothing of rows x E elements is made. Gradients go through P alone.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    n = layers[0].shape[-1]
    chosen, probability, rows = layers[0].new_zeros(n * n), layers[0].new_zeros(n, n, dtype=torch.float32), 0
    for logits in layers:
        if mask is not None:
            kept = mask.flatten().bool()
            logits = logits[:, kept.repeat_interleave(logits.shape[1] // len(kept))]
        _, indices = ops.product_key_topk(logits[0].detach(), logits[1].detach(), k)
        chosen = chosen + torch.bincount(indices.flatten(), minlength=n * n)
        x, y = logits.float().softmax(-1)
        probability = probability + x.T @ y
        rows += logits.shape[1]
    return n * n * (chosen.view(n, n) / (rows * k) * probability / rows).sum()


def product_keys(heads: int, n: int, r: int) -> nn.Parameter:
    """Keys [heads, n, 2, r], N(0, 1 / r): scores vary as queries do, so that gradients flow from the first step."""
    return nn.Parameter(torch.randn(heads, n, 2, r) * r**-0.5)


def expert_table(rows: int, d: int) -> nn.Embedding:
    """Rows [rows, d] of experts, N(0, 1 / d)."""
    memory = torch.empty(rows, d)
    if memory.device.type == "cpu":  # rows from here and there miss the address cache of small pages
        native.use_huge_pages(memory.data_ptr(), memory.nbytes)
    table = nn.Embedding(rows, d, _weight=memory)
    nn.init.normal_(table.weight, std=d**-0.5)
    return table


def check_experts(layer: str, field: str, experts: int, k_field: str, k: int) -> int:
    """Keys on each side, sqrt(experts). Raises ThriftyError unless that is whole and 1 <= k <= experts."""
    n = math.isqrt(max(experts, 0))
    if n == 0 or n * n != experts:
        raise ThriftyError(
            f"[{layer}] {field} must be the square of a whole number, as an expert is a pair of keys; got {experts}; "
            f"take {max(n, 1) ** 2} or {(n + 1) ** 2}"
        )
    if not 1 <= k <= experts:
        raise ThriftyError(
            f"[{layer}] {k_field} must be 1 to {field} = {experts}; got {k}; choose fewer, or give it more experts"
        )
    return n


def _check_router(router: str, layout: str, heads: int, retrieval: int) -> None:
    if router not in ROUTERS:
        raise ThriftyError(f"[CDMoE] router must be one of {', '.join(ROUTERS)}; got '{router}'")
    if layout not in ROUTER_LAYOUTS:
        raise ThriftyError(f"[CDMoE] router_layout must be one of {', '.join(ROUTER_LAYOUTS)}; got '{layout}'")
    if heads < 1 or (router == "linear" and heads != 1):
        raise ThriftyError(
            f"[CDMoE] n_experts_heads must be 1 with router='linear', and at least 1; got {heads}; for more heads take "
            "router='product_key_heads'"
        )
    if router == "product_key_heads" and (retrieval < 2 or retrieval % 2):
        raise ThriftyError(
            f"[CDMoE] d_private_expert_retrieval must be even, half of it for each key of a pair; got {retrieval}; "
            f"take {max(2, retrieval + 1)}"
        )
    if layout == "legacy":
        if router != "linear":
            raise ThriftyError("[CDMoE] router_layout='legacy' is of router='linear'; got 'product_key_heads'")
        warnings.warn(
            "router_layout='legacy' mixes the scores of tokens, later ones and other sequences' included, as "
            "transformers' Doge does; use it to run published checkpoints, and 'per_token' to train",
            stacklevel=3,
        )


def _one_of(name: str, value: int | None, other: str, other_value: int | None, default: int) -> int:
    if value is not None and other_value is not None and value != other_value:
        raise ThriftyError(f"[CDMoE] {name} and {other} name one size; got {value} and {other_value}; give one")
    given = value if value is not None else other_value
    return default if given is None else given
