"""Choosing an implementation: the native library for CPU tensors where it is built, plain torch otherwise."""

from torch import Tensor

from thrifty import native


def use_native(x: Tensor) -> bool:
    """Whether the native library can work on x: CPU memory, and the library is there."""
    return x.device.type == "cpu" and native.available()
