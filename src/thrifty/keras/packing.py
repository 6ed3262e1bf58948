"""The walks over a model that pack its ternary layers and unpack them."""

from collections.abc import Callable
from typing import Any, TypeVar

import keras

from thrifty.errors import ThriftyError
from thrifty.keras.layers.core import DenseMML, dense_layers

L = TypeVar("L", bound=keras.layers.Layer)
#: Says of a layer whether a walk takes it.
Where = Callable[[DenseMML], bool]


def pack(model: L, where: Where | None = None) -> L:
    """Hold every `DenseMML` that `where(layer)` accepts at 1.6 bits a weight, in place; returns the model.

    Packed layers run through the native kernels, are saved packed, and do not train. Functions that the model, or a
    model inside of it, has compiled are made anew; one around it, or one that shares layers with it, has to be packed
    itself. Optimizers keep their count of steps, and start anew otherwise with what still trains.
    Raises ThriftyError where there is nothing to pack, a layer is not built, or its kernel is not finite; layers
    before that one are then packed.
    """
    layers = _chosen(model, where)
    if not layers:
        raise ThriftyError(
            f"[pack] a model must have DenseMML layers to pack; '{model.name}' has none that are accepted"
        )
    unbuilt = [layer.name for layer in layers if not layer.built]
    if unbuilt:
        raise ThriftyError(
            f"[DenseMML] a layer must be built to be packed; {', '.join(unbuilt)} of '{model.name}' are not; call the "
            "model once"
        )
    _change(model, [layer.pack for layer in layers if not layer.packed])
    return model


def unpack(model: L, where: Where | None = None) -> L:
    """Make every packed `DenseMML` that `where(layer)` accepts trainable again, in place; returns the model.

    The float kernels have the codes and scales of before, so packing again gives the same bits.
    """
    _change(model, [layer.unpack for layer in _chosen(model, where) if layer.packed])
    return model


def is_packed(model: Any) -> bool:
    """Whether any layer of the model is packed."""
    return any(layer.packed for layer in dense_layers(model))


def _chosen(model: Any, where: Where | None) -> list[DenseMML]:
    return [layer for layer in dense_layers(model) if where is None or where(layer)]


def _change(model: Any, steps: list[Callable[[], None]]) -> None:
    """Pack or unpack layers one by one; models forget what they compiled, also where one fails."""
    if not steps:
        return
    try:
        for step in steps:
            step()
    finally:
        parts = model._flatten_layers()
        if keras.backend.backend() == "torch":
            for part in parts:  # torch's list of parameters
                part._track_variables()
        for part in parts:
            if isinstance(part, keras.Model):
                _begin_anew(part)


def _begin_anew(model: keras.Model) -> None:
    """Forget what was compiled for other variables, and the optimizer's slots of them."""
    model.train_function = model.test_function = model.predict_function = None
    if not model.compiled:
        return
    supported = all(layer.supports_jit for layer in model._flatten_layers())
    if model.jit_compile and not supported:
        model.jit_compile, model._jit_when_unpacked = False, True
    elif supported and getattr(model, "_jit_when_unpacked", False):
        model.jit_compile, model._jit_when_unpacked = True, False
    if model.optimizer is not None:
        optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(model.optimizer.iterations)
        model.optimizer = optimizer
        # What `compile` was given is kept for saving, and would keep the float kernels alive.
        model._compile_config.config["optimizer"] = optimizer
