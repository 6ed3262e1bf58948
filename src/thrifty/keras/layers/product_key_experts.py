"""Experts by the million, found by product keys, beside a shared gated MLP."""

import math
from typing import Any, Literal

import keras
from keras import activations, ops

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.keras.layers.core import PackedParts, features, positive
from thrifty.keras.layers.linear import Linear, Projections

Router = Literal["product_key_heads", "linear"]
ROUTERS = ("product_key_heads", "linear")


@keras.saving.register_keras_serializable(package="thrifty")
class CrossDomainMoE(PackedParts, keras.layers.Layer):
    """y = down(act(gate x) * up x) + sum_k w_k act(x . d_k) u_k: a shared gated MLP and k of n experts (2412.11834).

    x: [..., d] -> [..., d]. An expert is one hidden unit, the rows d_e of `down_embed` and u_e of `up_embed`. Each of
    num_heads heads chooses experts_per_head of num_experts, a square, by the sums of two scores, exactly: of equal sums
    the smaller number; w is the softmax over a head's sums, with norm_topk_prob divided by the sum over all heads.
    router="product_key_heads" (WonderfulMatrices) has queries of key_dim features a head, half for each key of a pair;
    "linear" (transformers' Doge) has one head, and scores straight from x.

    intermediate_dim: hidden units of the MLP, 2 d unless given. activation: whatever Keras knows. linear="ternary"
    makes the MLP's layers `DenseMML`; router and experts stay dense. router_aux_loss_coef times the Switch loss
    E sum_e f_e P_e (arXiv 2101.03961), 1 where all is even, is added to the model's losses; padding, where a mask is
    False, does not count in it. Masks pass through. tokens * num_heads * experts_per_head * d numbers are gathered.

    Other arguments: those of `keras.layers.Dense`, for the MLP and the router. Raises ThriftyError for sizes that do
    not fit and unknown options. Its pair is `thrifty.nn.CDMoE`.
    """

    def __init__(
        self,
        num_experts: int = 16384,
        experts_per_head: int = 64,
        num_heads: int = 1,
        *,
        key_dim: int = 64,
        intermediate_dim: int | None = None,
        activation: Any = "silu",
        router: Router = "product_key_heads",
        norm_topk_prob: bool = False,
        router_aux_loss_coef: float = 0.0,
        use_bias: bool = True,
        linear: Linear = "dense",
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if intermediate_dim is not None:
            positive("CrossDomainMoE", "intermediate_dim", intermediate_dim)
        self.num_keys = _check_experts(num_experts, experts_per_head)
        _check_router(router, num_heads, key_dim)
        self.num_experts, self.experts_per_head, self.num_heads = num_experts, experts_per_head, num_heads
        self.key_dim, self.intermediate_dim, self.router = key_dim, intermediate_dim, router
        self.activation = activations.get(activation)
        self.norm_topk_prob, self.router_aux_loss_coef = norm_topk_prob, router_aux_loss_coef
        self.projections = Projections(
            *("CrossDomainMoE", linear, use_bias, kernel_initializer, bias_initializer),
            *(kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint),
        )
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(min_ndim=2)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        d = features("CrossDomainMoE", input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: d})
        hidden, policy = self.intermediate_dim or 2 * d, self.dtype_policy
        self.gate_proj = self.projections.make(hidden, "gate_proj", policy)
        self.up_proj = self.projections.make(hidden, "up_proj", policy)
        self.down_proj = self.projections.make(d, "down_proj", policy)
        r = self.key_dim // 2
        width = 2 * self.num_keys if self.router == "linear" else 2 * self.num_heads * r
        name = "router_gate" if self.router == "linear" else "queries"
        self.router_proj = self.projections.make(width, name, policy, dense=True, use_bias=False)
        for projection in (self.gate_proj, self.up_proj, self.router_proj):
            projection.build(input_shape)
        self.down_proj.build((*input_shape[:-1], hidden))
        self.keys = None
        if self.router == "product_key_heads":
            drawn = keras.initializers.RandomNormal(stddev=r**-0.5)
            self.keys = self.add_weight(name="keys", shape=(self.num_heads, self.num_keys, 2, r), initializer=drawn)
        self.down_embed, self.up_embed = (
            self.add_weight(
                name=name, shape=(self.num_experts, d), initializer=keras.initializers.RandomNormal(stddev=d**-0.5)
            )
            for name in ("down_embed", "up_embed")
        )

    def call(self, inputs: Any, mask: Any = None) -> Any:
        shared = self.down_proj(self.activation(self.gate_proj(inputs)) * self.up_proj(inputs))
        x = ops.reshape(inputs, (-1, inputs.shape[-1]))
        scores_x, scores_y = self._scores(x)
        k, n = self.experts_per_head, self.num_keys
        chosen = best_pairs(scores_x, scores_y, k)  # [tokens * heads, k]
        if self.router_aux_loss_coef:
            weight = None
            if mask is not None:
                weight = ops.repeat(ops.cast(ops.reshape(mask, (-1,)), "float32"), self.num_heads)
            self.add_loss(self.router_aux_loss_coef * _load_balance_loss(scores_x, scores_y, chosen, weight))
        sums = ops.take_along_axis(scores_x, chosen // n, -1) + ops.take_along_axis(scores_y, chosen % n, -1)
        weights, chosen = (ops.reshape(t, (-1, self.num_heads * k)) for t in (ops.softmax(sums, axis=-1), chosen))
        if self.norm_topk_prob:
            weights = weights / ops.sum(weights, axis=-1, keepdims=True)
        down, up = (ops.take(ops.cast(t, x.dtype), chosen, axis=0) for t in (self.down_embed, self.up_embed))
        hidden = ops.squeeze(ops.matmul(down, x[..., None]), -1)
        mixture = ops.cast(weights * ops.cast(self.activation(hidden), "float32"), x.dtype)
        routed = ops.squeeze(ops.matmul(mixture[:, None], up), 1)
        return shared + ops.reshape(routed, ops.shape(inputs))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        names = ("num_experts", "experts_per_head", "num_heads", "key_dim", "intermediate_dim", "router")
        own = {name: getattr(self, name) for name in (*names, "norm_topk_prob", "router_aux_loss_coef")}
        own["activation"] = activations.serialize(self.activation)
        return {**super().get_config(), **own, **self.projections.get_config()}

    def _scores(self, x: Any) -> tuple[Any, Any]:
        """The scores float32 [tokens * heads, n] of both halves of a key."""
        logits = self.router_proj(x)
        if self.keys is None:
            scores = ops.reshape(logits, (-1, 2, self.num_keys))
        else:
            queries = ops.reshape(logits, (-1, 2, self.num_heads, self.key_dim // 2))
            scores = ops.einsum("tphr,hkpr->thpk", queries, ops.cast(self.keys, queries.dtype))
            scores = ops.reshape(scores, (-1, 2, self.num_keys))
        scores = ops.cast(scores, "float32")
        return scores[:, 0], scores[:, 1]


def best_pairs(x: Any, y: Any, k: int) -> Any:
    """The numbers i n + j of the k best sums x_i + y_j, in no certain order (product keys, arXiv 1907.05242).

    x, y: float32 [N, n], k <= n^2. Of equal sums the smaller number is chosen. Returns int32 [N, k]
    (`thrifty.spec.product_key_topk`). No gradient.
    """
    n = x.shape[-1]
    x, y = ops.stop_gradient(x), ops.stop_gradient(y)
    (best_x, at_x), (best_y, at_y) = (ops.top_k(t, min(k + 1, n)) for t in (x, y))
    i, j = (ops.convert_to_tensor(ranks.tolist(), "int32") for ranks in spec.staircase(k, n))
    sums = ops.take(best_x, i, axis=-1) + ops.take(best_y, j, axis=-1)
    numbers = ops.cast(ops.take(at_x, i, axis=-1) * n + ops.take(at_y, j, axis=-1), "int32")
    last = ops.top_k(sums, k)[0][:, -1:]
    chosen = _chosen(sums, numbers, last, k, n)
    outside = [(i, k // (i + 1)) for i in range(min(k + 1, n)) if k // (i + 1) < n]
    if not outside:
        return chosen
    # Sums are rounded, so one just outside of the staircase may equal the last chosen, with a smaller number. It is
    # rare, and then all pairs of that row are looked at.
    i, j = (ops.convert_to_tensor(ranks, "int32") for ranks in zip(*outside, strict=True))
    tied = ops.any(ops.take(best_x, i, axis=-1) + ops.take(best_y, j, axis=-1) >= last, axis=-1)
    rows, count = ops.argsort(ops.where(tied, 0, 1)), ops.sum(ops.cast(tied, "int32"))
    places, every = ops.arange(ops.shape(x)[0], dtype="int32"), ops.arange(n * n, dtype="int32")[None]

    def correct(step, chosen):
        row = ops.take(rows, step, axis=0)
        x_row, y_row, last_row = (ops.take(t, row, axis=0) for t in (x, y, last))
        right = _chosen(ops.reshape(x_row[:, None] + y_row, (1, n * n)), every, last_row[None], k, n)
        return step + 1, ops.where((places == row)[:, None], right, chosen)

    return ops.while_loop(lambda step, _: step < count, correct, (ops.zeros((), "int32"), chosen))[1]


def _chosen(sums: Any, numbers: Any, last: Any, k: int, n: int) -> Any:
    """The numbers of all sums above the k-th best, `last`, and the smallest numbers of those equal to it."""
    order = ops.where(sums > last, 2 * n * n, n * n) - numbers
    order = ops.where(sums < last, 0, order)
    # Whole numbers that do not tie; floats are chosen from faster, as long as they hold them.
    order = ops.cast(order, "float32") if 2 * n * n < 1 << 24 else order
    return ops.take_along_axis(ops.broadcast_to(numbers, ops.shape(sums)), ops.top_k(order, k)[1], -1)


def _load_balance_loss(x: Any, y: Any, chosen: Any, weight: Any) -> Any:
    """E sum_e f_e P_e over rows of weight 1, f_e the share of choices that went to e, P_e its mean probability.

    x, y: scores [rows, n]; chosen: [rows, k]. A softmax over sums of two scores is the product of two softmaxes, so
    that nothing of rows * E numbers is made. Gradients go through P alone.
    """
    n, k = x.shape[-1], chosen.shape[-1]
    weight = ops.ones_like(x[:, 0]) if weight is None else weight
    count = ops.maximum(ops.sum(weight), 1.0)
    probability = ops.matmul(ops.transpose(ops.softmax(x, axis=-1) * weight[:, None]), ops.softmax(y, axis=-1)) / count
    met = ops.take(ops.reshape(probability, (-1,)), chosen, axis=0)
    return n * n * ops.sum(met * weight[:, None]) / (count * k)


def _check_experts(experts: int, k: int) -> int:
    """Keys on each side, sqrt(experts)."""
    n = math.isqrt(max(experts, 0))
    if n == 0 or n * n != experts:
        raise ThriftyError(
            "[CrossDomainMoE] num_experts must be the square of a whole number, as an expert is a pair of keys; got "
            f"{experts}; take {max(n, 1) ** 2} or {(n + 1) ** 2}"
        )
    if not 1 <= k <= experts:
        raise ThriftyError(
            f"[CrossDomainMoE] experts_per_head must be 1 to num_experts = {experts}; got {k}; choose fewer, or give "
            "it more experts"
        )
    return n


def _check_router(router: str, heads: int, key_dim: int) -> None:
    if router not in ROUTERS:
        raise ThriftyError(f"[CrossDomainMoE] router must be one of {', '.join(ROUTERS)}; got {router!r}")
    if heads < 1 or (router == "linear" and heads != 1):
        raise ThriftyError(
            f"[CrossDomainMoE] num_heads must be 1 with router='linear', and at least 1; got {heads}; for more heads "
            "take router='product_key_heads'"
        )
    if router == "product_key_heads" and (key_dim < 2 or key_dim % 2):
        raise ThriftyError(
            f"[CrossDomainMoE] key_dim must be even, half of it for each key of a pair; got {key_dim}; take "
            f"{max(2, key_dim + 1)}"
        )
