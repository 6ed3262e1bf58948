"""Token mixers over numpy arrays, by the definitions in `thrifty.spec`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from thrifty import native, spec
from thrifty.checkpoint import Folder
from thrifty.checkpoint.names import GATE_BOUNDS, has_bias, linear_shapes
from thrifty.runtime.attention import attention
from thrifty.runtime.cache import NumpyCache
from thrifty.runtime.projection import DenseProjection, TernaryProjection


@dataclass(frozen=True)
class Step:
    """New positions of a sequence, from `first` on, in one layer."""

    #: float32 [T, head_dim / 2].
    cos: np.ndarray
    sin: np.ndarray
    cache: NumpyCache
    layer: int
    first: int


class Mixer(Protocol):
    """From the residual stream [T, hidden] to what `o_proj` takes."""

    nbytes: int

    def __call__(self, x: np.ndarray, step: Step) -> np.ndarray: ...


class Linears:
    """y = norm(x) W^T + b of several linears of a layer with the same input, their rows stacked.

    They are one product, but where each has a norm of its own after the common one, and so an input of its own.
    """

    def __init__(self, folder: Folder, layer: int, linears: list[str], norm: str | None) -> None:
        config, eps = folder.config, folder.config.linear_norm_eps
        self._eps, self._gain = config.rms_norm_eps, None
        if eps is None:
            self._parts = [_projection(folder, layer, linears, norm, config.rms_norm_eps)]
        else:
            self._gain = None if norm is None else folder.float32(f"model.layers.{layer}.{norm}.weight")
            self._parts = [_projection(folder, layer, [linear], f"{linear}.rms_norm", eps) for linear in linears]
        self.nbytes = sum(part.nbytes for part in self._parts)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """y float32 [T, rows] for x float32 [T, cols]."""
        if self._gain is not None:
            x = native.rms_norm(x, self._gain, self._eps)
        first, *rest = [part(x) for part in self._parts]
        return np.concatenate([first, *rest], 1) if rest else first


def _projection(
    folder: Folder, layer: int, linears: list[str], norm: str | None, eps: float
) -> TernaryProjection | DenseProjection:
    """Linears of a layer as one product, with the norm in front of them."""
    config, prefix = folder.config, f"model.layers.{layer}."
    rows = [linear_shapes(config, layer)[linear][0] for linear in linears]
    gain = None if norm is None else folder.float32(f"{prefix}{norm}.weight")
    bias = None
    if has_bias(config, linears[0]):
        bias = np.concatenate([folder.bias(prefix + linear) for linear in linears])
    if config.linear == "dense":
        weight = np.concatenate([folder.float32(f"{prefix}{linear}.weight") for linear in linears])
        return DenseProjection(weight, bias, gain, eps)
    parts = [folder.codes(prefix + linear, n) for linear, n in zip(linears, rows, strict=True)]
    codes = np.concatenate([codes for codes, _ in parts]) if len(parts) > 1 else parts[0][0]
    scale = np.array([scale for _, scale in parts], np.float32)
    if len(parts) > 1:
        scale = np.repeat(scale, rows)
    return TernaryProjection(native.PackedMatrix.from_codes(codes, "i2"), scale, bias, gain, eps)


class _Keyed:
    """Queries, keys and values of attention and of a dynamic mask, keys kept in the cache."""

    def __init__(self, folder: Folder, layer: int) -> None:
        c = folder.config
        self._qkv = Linears(folder, layer, [f"self_attn.{x}_proj" for x in "qkv"], "input_layernorm")
        self._split = [c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads]
        self._head_dim, self._eps = c.head_dim, c.rms_norm_eps
        normed = c.attention_qk_norm if c.mixer(layer) == "attention" else c.qk_norm
        norms = [f"model.layers.{layer}.self_attn.{x}_norm.weight" for x in "qk"] if normed else []
        self._gains = [folder.float32(norm) for norm in norms]
        self.nbytes = self._qkv.nbytes

    def _heads(self, x: np.ndarray, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """q [T, heads, d] and the new v [T, kv_heads, d]; k and v are in the cache then."""
        q, k, v = np.split(self._qkv(x).reshape(len(x), -1, self._head_dim), self._split, axis=1)
        if self._gains:
            q, k = (spec.rms_norm(t, gain, self._eps) for t, gain in zip((q, k), self._gains, strict=True))
        q, k = (spec.apply_rope(t, step.cos, step.sin) for t in (q, k))
        new = slice(step.first, step.first + len(x))
        step.cache.keys[step.layer][:, new] = k.transpose(1, 0, 2)
        step.cache.values[step.layer][:, new] = v.transpose(1, 0, 2)
        return q, v


class _Attention(_Keyed):
    def __call__(self, x: np.ndarray, step: Step) -> np.ndarray:
        q, _ = self._heads(x, step)
        y = np.empty((len(x), q.shape[1] * q.shape[2]), np.float32)
        attention(q, step.cache.keys[step.layer], step.cache.values[step.layer], step.first, y)
        return y


class _DynamicMask(_Keyed):
    def __init__(self, folder: Folder, layer: int) -> None:
        super().__init__(folder, layer)
        prefix = f"model.layers.{layer}.self_attn."
        self._A, self._weight = folder.float32(f"{prefix}A"), folder.float32(f"{prefix}dt_proj.weight")
        self._bias = folder.float32(f"{prefix}dt_proj.bias") if folder.config.attention_bias else None
        self._window = folder.config.window

    def __call__(self, x: np.ndarray, step: Step) -> np.ndarray:
        q, v = self._heads(x, step)
        stop = step.first + len(x)
        scores = step.cache.scores[step.layer]
        scores[step.first : stop] = spec.key_scores(v, self._A, self._weight, self._bias)
        k, v = (part[step.layer][:, :stop].transpose(1, 0, 2) for part in (step.cache.keys, step.cache.values))
        return spec.dynamic_mask_attention(q, k, v, scores[:stop], self._window, step.first).reshape(len(x), -1)


class _MLGRU:
    def __init__(self, folder: Folder, layer: int) -> None:
        self._fcg = Linears(folder, layer, [f"self_attn.{x}_proj" for x in "fcg"], "input_layernorm")
        self.nbytes = self._fcg.nbytes

    def __call__(self, x: np.ndarray, step: Step) -> np.ndarray:
        f, c, g = np.split(self._fcg(x), 3, axis=1)
        f, c, g = spec.ACTIVATIONS["sigmoid"](f), spec.ACTIVATIONS["silu"](c), spec.ACTIVATIONS["sigmoid"](g)
        state = step.cache.states[step.layer]
        h = spec.mlgru(f, c, state if step.first else None)
        state[:] = h[-1]
        return g * h


class _HGRN:
    def __init__(self, folder: Folder, layer: int) -> None:
        c = folder.config
        self._ifg = Linears(folder, layer, [f"self_attn.{x}_proj" for x in "ifg"], "input_layernorm")
        self._bounds = spec.gate_bounds(folder.float32(GATE_BOUNDS))[layer] if c.gate_bounds else None
        self._gain = folder.float32(f"model.layers.{layer}.self_attn.g_norm.weight")
        self._eps = c.rms_norm_eps
        self.nbytes = self._ifg.nbytes

    def __call__(self, x: np.ndarray, step: Step) -> np.ndarray:
        i, f, g = np.split(self._ifg(x), 3, axis=1)
        i, f = spec.ACTIVATIONS["silu"](i), spec.ACTIVATIONS["sigmoid"](f)
        state = step.cache.states[step.layer]
        h = spec.mlgru(f, i, state if step.first else None, self._bounds)
        state[:] = h[-1]
        return spec.rms_norm(g, self._gain, self._eps) * spec.ACTIVATIONS["silu"](h)


class _SSD:
    def __init__(self, folder: Folder, layer: int) -> None:
        c, prefix = folder.config, f"model.layers.{layer}."
        self._xbc = Linears(folder, layer, [f"self_attn.{x}_proj" for x in "xbc"], "input_layernorm")
        bias = folder.float32(f"{prefix}self_attn.dt_proj.bias") if c.attention_bias else None
        gain = folder.float32(f"{prefix}input_layernorm.weight")
        self._dt = DenseProjection(folder.float32(f"{prefix}self_attn.dt_proj.weight"), bias, gain, c.rms_norm_eps)
        self._A = -np.exp(folder.float32(f"{prefix}self_attn.A_log"))
        self._heads, self._rotary = c.num_attention_heads, c.ssd_rotary
        self.nbytes = self._xbc.nbytes + self._dt.nbytes

    def __call__(self, x: np.ndarray, step: Step) -> np.ndarray:
        T = len(x)
        values, B, C = (part.reshape(T, self._heads, -1) for part in np.split(self._xbc(x), 3, axis=1))
        if self._rotary:
            B, C = (spec.apply_rope(t, step.cos, step.sin) for t in (B, C))
        dt = self._dt(x)
        state = step.cache.states[step.layer]
        steps = np.logaddexp(np.float32(0), dt)
        y, state[:] = spec.ssd(values, steps, self._A, B, C, state=state.copy() if step.first else None)
        return y.reshape(T, -1)


#: By the names in `DecoderConfig.mixers`.
MIXERS: dict[str, Callable[[Folder, int], Mixer]] = {
    "attention": _Attention,
    "dynamic_mask": _DynamicMask,
    "mlgru": _MLGRU,
    "hgrn": _HGRN,
    "ssd": _SSD,
}
