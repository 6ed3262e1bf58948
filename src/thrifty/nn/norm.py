import torch
from torch import Tensor, nn

from thrifty import ops


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32, returned in the dtype of x (arXiv 1910.07467).

    x: [..., dim]; weight: [dim]. The order of the sum is pinned by `thrifty.spec.rms_norm`, because what follows is
    rounded to integers.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
