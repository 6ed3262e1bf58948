"""Routed experts over numpy arrays, by the definitions in `thrifty.spec`."""

import numpy as np

from thrifty import native, spec
from thrifty.checkpoint import Folder, Tensor
from thrifty.errors import ThriftyError


class Experts:
    """y = sum_k w_k act(z . d_k) u_k over the experts that each row chooses, z = post_attention_layernorm(x)."""

    def __init__(self, folder: Folder, layer: int) -> None:
        c, prefix = folder.config, f"model.layers.{layer}."
        if c.experts is None:
            raise ThriftyError("[experts] the config must have experts; got none")
        self._config, self._act = c.experts, spec.ACTIVATIONS[c.hidden_act]
        self._gain, self._eps = folder.float32(f"{prefix}post_attention_layernorm.weight"), c.rms_norm_eps
        self._tables = [folder.tensors[f"{prefix}mlp.{name}_embed.weight"] for name in ("down", "up")]
        self._keys = None
        if c.experts.router == "linear":
            self._router = folder.float32(f"{prefix}mlp.router_gate.weight")
        else:
            self._router = folder.float32(f"{prefix}mlp.queries.weight")
            self._keys = folder.float32(f"{prefix}mlp.keys")
        chosen = c.experts.heads * c.experts.per_head * c.hidden_size
        self.nbytes = self._router.nbytes + sum(chosen * table.data.itemsize for table in self._tables)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """y float32 [T, hidden] for x float32 [T, hidden]."""
        z, c = native.rms_norm(x, self._gain, self._eps), self._config
        scores = z @ self._router.T
        if self._keys is not None:
            queries = scores.reshape(len(x), 2, c.heads, -1)
            scores = np.einsum("tphr,hkpr->tphk", queries, self._keys)
        first, second = scores.reshape(len(x), 2, c.heads, c.keys).swapaxes(0, 1)
        sums, numbers = spec.product_key_topk(first, second, c.per_head)
        weights = np.exp(sums - sums.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).reshape(len(x), -1)
        if c.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdims=True)
        used, numbers = np.unique(numbers, return_inverse=True)
        down, up = (Tensor(table.dtype, table.data[used]).float32() for table in self._tables)
        return spec.product_key_experts(z, numbers.reshape(len(x), -1), weights, down, up, self._act)
