"""Runs a packed model with numpy and the native library: no torch, no transformers."""

from thrifty.runtime.conversation import Conversation
from thrifty.runtime.drafting import Drafting
from thrifty.runtime.inference import BitNetInference
from thrifty.runtime.runtime import Runtime, load

__all__ = ["BitNetInference", "Conversation", "Drafting", "Runtime", "load"]
