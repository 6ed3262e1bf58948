"""What differs between Keras' backends: calls into the native library from inside of traced functions."""

import itertools
from collections.abc import Callable
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
    """A function of an array that can be called on a tensor, eagerly or in a function that the backend traces."""

    def __init__(self) -> None:
        #: By which an op of torch, which takes nothing but tensors and numbers, finds it.
        self._number = next(_NUMBERS)
        _FUNCTIONS[self._number] = self

    def on_array(self, x: np.ndarray) -> np.ndarray:
        """float32 [..., width] of an array [..., d]."""
        raise NotImplementedError

    def on_tensor(self, x: Any, width: int) -> Any:
        """`on_array` of a tensor of floats. It has no gradient: asking for one raises ThriftyError."""
        if _BACKEND == "jax":
            return _call_from_jax(self.on_array, x, width)
        if _BACKEND == "tensorflow":
            return _call_from_tensorflow(self.on_array, x, width)
        return _call_from_torch(self, self._number, x, width)


def let_go(layer: keras.layers.Layer, name: str) -> None:
    """Sets an attribute that is a variable to None, so that nothing of the layer's holds on to it."""
    layer._untrack_variable(getattr(layer, name))
    if _BACKEND == "tensorflow":  # its checkpoints list variables by attribute
        layer._delete_tracking(name)
    setattr(layer, name, None)


def _refuse_gradient(*_: Any) -> NoReturn:
    raise ThriftyError(
        "[pack] a packed layer passes no gradients on; got a loss that needs them; thrifty.keras.unpack(model) "
        "makes it trainable"
    )


def _call_from_jax(function: Callable[[np.ndarray], np.ndarray], x: Any, width: int) -> Any:
    import jax

    result = jax.ShapeDtypeStruct((*x.shape[:-1], width), np.float32)

    def call(x: Any) -> Any:
        return jax.pure_callback(function, result, x, vmap_method="sequential")

    call = jax.custom_jvp(call)
    call.defjvp(_refuse_gradient)
    return call(x)


def _call_from_tensorflow(function: Callable[[np.ndarray], np.ndarray], x: Any, width: int) -> Any:
    import tensorflow as tf

    @tf.custom_gradient
    def call(x: Any) -> Any:
        y = tf.numpy_function(function, [x], tf.float32, stateful=False)
        y.set_shape((*x.shape[:-1], width))
        return y, _refuse_gradient

    return call(x)


def _call_from_torch(function: NativeFunction, number: int, x: Any, width: int) -> Any:
    import torch

    # Keras asks for shapes with tensors on the device "meta".
    if torch.compiler.is_compiling() or x.requires_grad or x.is_meta:
        return _CALL(x, number, width)
    return _on_torch_tensor(function, x)


def _on_torch_tensor(function: NativeFunction, x: Any) -> Any:
    import torch

    _use_native(x)  # on torch's own threads
    return torch.from_numpy(function.on_array(x.detach().float().cpu().numpy())).to(x.device)


def _torch_op() -> Callable[..., Any]:
    """The call as an op of torch, which `torch.compile` leaves as it is."""
    import torch

    @torch.library.custom_op("thrifty::call_native", mutates_args=())
    def call(x: torch.Tensor, function: int, width: int) -> torch.Tensor:
        return _on_torch_tensor(_FUNCTIONS[function], x)

    @call.register_fake
    def _(x: torch.Tensor, function: int, width: int) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], width), dtype=torch.float32)

    call.register_autograd(_refuse_gradient)
    return call


if _BACKEND == "torch":
    from thrifty.ops.dispatch import use_native as _use_native

    _CALL = _torch_op()
