"""Rotary positions."""

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the first and second half of a head (arXiv 2104.09864).

    x: [..., T, heads, head_dim]; cos, sin: float32 [..., T, head_dim / 2], from `thrifty.spec.rope_tables`. Computed in
    float32, returned in the dtype of x.
    """
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
