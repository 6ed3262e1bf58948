"""Runs a packed model with numpy and the native library: no torch, no transformers."""

from thrifty.runtime.conversation import Conversation
from thrifty.runtime.inference import BitNetInference
from thrifty.runtime.runtime import Runtime, load

__all__ = ["BitNetInference", "Conversation", "Runtime", "load"]
