from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from thrifty import spec


class RotaryEmbedding(nn.Module):
    """cos and sin of position * theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864), from `thrifty.spec.rope_tables`.

    position_ids: int [..., T], below max_positions -> two float32 [..., T, head_dim / 2], for `thrifty.ops.apply_rope`.
    The tables stay float32 whatever dtype the model is cast to. scaling: of the frequencies, as in Llama 3.1.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_positions: int,
        theta: float = 10_000.0,
        scaling: spec.RopeScaling | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.theta = theta
        self.scaling = scaling
        for name, table in self.tables().items():
            # Under a meta device the shape is what counts; `reset_parameters` fills the tables in afterwards.
            empty = torch.empty(table.shape, dtype=torch.float32)
            self.register_buffer(name, empty if empty.is_meta else table, persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """The tables for all positions, freshly computed."""
        cos, sin = spec.rope_tables(np.arange(self.max_positions), self.head_dim, self.theta, self.scaling)
        return {"cos": torch.from_numpy(cos), "sin": torch.from_numpy(sin)}

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids], self.sin[position_ids]

    def _apply(self, fn: Callable, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32 and not self.cos.is_meta:
            for name, table in self.tables().items():
                self.register_buffer(name, table.to(self.cos.device), persistent=False)
        return self

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, max_positions={self.max_positions}, theta={self.theta}"
