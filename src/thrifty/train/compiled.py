"""Training through compiled layers."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


def can_compile() -> bool:
    """Whether there is the C++ compiler that torch.compile needs for a CPU."""
    return torch.cuda.is_available() or any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


class CompiledLayers:
    """The layers of a decoder, compiled while training and as they were otherwise.

    One layer is compiled and serves all, for they differ in their weights only. Evaluation has other shapes and no
    gradients, which would each be compiled anew: it goes through the layers themselves.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Where compiling fails, torch says so and goes on without.
        torch._dynamo.config.suppress_errors = True
        self.layers = list(model.get_submodule("model.layers").children())
        self.forwards: list[Callable] = [torch.compile(layer.forward, dynamic=False) for layer in self.layers]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        for layer, forward in zip(self.layers, self.forwards, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward
