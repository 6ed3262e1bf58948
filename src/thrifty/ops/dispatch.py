"""Choosing an implementation: the native library for CPU tensors where it is built, plain torch otherwise."""

import torch
from torch import Tensor

from thrifty import native


def use_native(x: Tensor) -> bool:
    """Whether the native library can work on x: CPU memory, and the library is there."""
    return x.device.type == "cpu" and native.available()


def is_fused() -> bool:
    """Whether a compiler is tracing a training step, which it fuses best when it sees all of the arithmetic."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled()


def is_evaluation(x: Tensor) -> bool:
    """Whether x is evaluated by the native library, as the runtime would: float32, no gradient, nothing compiled."""
    return (
        x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and use_native(x)
    )
