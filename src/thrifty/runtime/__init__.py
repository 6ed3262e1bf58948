"""Runs a packed model with numpy and the native library: no torch, no transformers."""

from thrifty.runtime.runtime import Runtime, load

__all__ = ["Runtime", "load"]
