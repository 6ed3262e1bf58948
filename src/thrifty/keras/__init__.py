"""Keras 3 layers and metrics that spend less, on the torch, JAX and TensorFlow backends."""

try:
    import keras as _keras
except ImportError as error:
    raise ImportError(
        f"[keras] Keras and the backend of KERAS_BACKEND must be installed; {error}; "
        "pip install 'thrifty[jax]' (or 'thrifty[tensorflow]', 'thrifty[keras,torch]') and set KERAS_BACKEND to it"
    ) from error

if _keras.backend.backend() not in ("torch", "jax", "tensorflow"):
    raise ImportError(
        f"[keras] KERAS_BACKEND must be torch, jax or tensorflow; got '{_keras.backend.backend()}'; set one of these"
    )

from thrifty.keras import layers, metrics
from thrifty.keras.keras_mml import load_keras_mml
from thrifty.keras.packing import is_packed, pack, unpack

__all__ = ["is_packed", "layers", "load_keras_mml", "metrics", "pack", "unpack"]
