"""One backend to a process: KERAS_BACKEND chooses, `make test` takes each in turn."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# These tests compile many small functions and run each once; tests/contracts compiles as users do.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import keras
import pytest


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.backend.backend()}"


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(params=["eager", "compiled"])
def traced(request):
    """A function as it is, and as the backend compiles it."""
    if request.param == "eager":
        return lambda function: function
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function
    import torch

    return lambda function: torch.compile(function, backend="eager")
