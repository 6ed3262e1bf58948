"""What differs between Keras' backends: calls into the native library from inside of traced functions."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import keras
import numpy as np

from thrifty.errors import ThriftyError

_BACKEND = keras.backend.backend()
#: Whether calls into the native library can be compiled with the rest of a model: XLA in TensorFlow refuses them.
NATIVE_SUPPORTS_JIT = _BACKEND != "tensorflow"
_NUMBERS = itertools.count()
_FUNCTIONS: "WeakValueDictionary[int, NativeFunction]" = WeakValueDictionary()


class NativeFunction:
    """A function of arrays that can be called on tensors, eagerly or from a function that the backend traces."""

    def __init__(self) -> None:
        #: By which an op of torch, which takes nothing but tensors and numbers, finds it.
        self._number = next(_NUMBERS)
        _FUNCTIONS[self._number] = self

    def on_arrays(self, *arrays: np.ndarray) -> np.ndarray:
        """float32 [..., width] of arrays, the first of which is [..., d]."""
        raise NotImplementedError

    def on_tensors(self, tensors: Sequence[Any], width: int) -> Any:
        """`on_arrays` of tensors. It has no gradient: asking for one raises ThriftyError."""
        if _BACKEND == "jax":
            return _call_from_jax(self.on_arrays, tensors, width)
        if _BACKEND == "tensorflow":
            return _call_from_tensorflow(self.on_arrays, tensors, width)
        return _CALL(list(tensors), self._number, width)


def _refuse_gradient(*_: Any) -> NoReturn:
    raise ThriftyError(
        "[DenseMML] a packed layer passes no gradients on; got a loss that needs them; thrifty.keras.unpack(model) "
        "makes it trainable"
    )


def _call_from_jax(function: Callable[..., np.ndarray], tensors: Sequence[Any], width: int) -> Any:
    import jax

    result = jax.ShapeDtypeStruct((*tensors[0].shape[:-1], width), np.float32)

    def call(*tensors: Any) -> Any:
        return jax.pure_callback(function, result, *tensors, vmap_method="sequential")

    call = jax.custom_jvp(call)
    call.defjvp(_refuse_gradient)
    return call(*tensors)


def _call_from_tensorflow(function: Callable[..., np.ndarray], tensors: Sequence[Any], width: int) -> Any:
    import tensorflow as tf

    @tf.custom_gradient
    def call(*tensors: Any) -> Any:
        y = tf.numpy_function(function, tensors, tf.float32, stateful=False)
        y.set_shape((*tensors[0].shape[:-1], width))
        return y, _refuse_gradient

    return call(*tensors)


def _torch_op() -> Callable[..., Any]:
    """The call as an op of torch, which `torch.compile` leaves as it is."""
    import torch

    from thrifty.ops.dispatch import use_native

    @torch.library.custom_op("thrifty::call_native", mutates_args=())
    def call(tensors: list[torch.Tensor], function: int, width: int) -> torch.Tensor:
        use_native(tensors[0])  # on torch's own threads
        y = _FUNCTIONS[function].on_arrays(*(t.detach().cpu().numpy() for t in tensors))
        return torch.from_numpy(y).to(tensors[0].device)

    @call.register_fake
    def _(tensors: list[torch.Tensor], function: int, width: int) -> torch.Tensor:
        return tensors[0].new_empty((*tensors[0].shape[:-1], width), dtype=torch.float32)

    call.register_autograd(_refuse_gradient)
    return call


_CALL: Any = _torch_op() if _BACKEND == "torch" else None
