"""Choosing an implementation: the native library for CPU tensors where it is built, plain torch otherwise."""

from types import ModuleType

from torch import Tensor


def native_for(x: Tensor) -> ModuleType | None:
    """`thrifty.native` where it can work on x (CPU memory, library present), else None."""
    try:
        from thrifty import native
    except ImportError:
        return None
    return native if x.device.type == "cpu" and hasattr(native, "available") and native.available() else None
