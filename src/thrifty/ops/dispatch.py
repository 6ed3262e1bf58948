"""Choosing an implementation: the native library for CPU tensors where it is built, plain torch otherwise."""

import ctypes
import sys
from functools import cache

import numpy as np
import torch
from torch import Tensor

from thrifty import native


def use_native(x: Tensor) -> bool:
    """Whether the native library can work on x: CPU memory, and the library is there."""
    if x.device.type != "cpu" or not native.available():
        return False
    _share_threads()
    return True


def as_array(x: Tensor) -> np.ndarray:
    """The memory of x. `x.numpy()` would tie it down, and FSDP2 frees the parameters of layers that have run."""
    return np.from_dlpack(x.detach().contiguous())


def is_fused() -> bool:
    """Whether a compiler is tracing a training step, which it fuses best when it sees all of the arithmetic."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled()


def is_evaluation(x: Tensor) -> bool:
    """Whether x is evaluated by the native library, as the runtime would: float32, no gradient, nothing compiled."""
    return (
        x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and use_native(x)
    )


@cache
def _share_threads() -> None:
    """Lets the native library work on torch's threads: after each of torch's own ops these spin for a while, and others
    would have to share the cores with them."""
    if sys.platform != "linux":
        return
    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # in whatever torch is linked with
    except (AttributeError, OSError):
        return
    native.use_openmp(ctypes.cast(parallel, ctypes.c_void_p).value)
