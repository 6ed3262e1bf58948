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

    Packed layers run through the native kernels, are saved packed, and do not train. Functions that the model compiled
    are made anew, and its optimizer starts anew with what still trains.
    Raises ThriftyError where there is nothing to pack, or a layer is not built; then nothing is changed.
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
    for layer in layers:
        layer.pack()
    _begin_anew(model)
    return model


def unpack(model: L, where: Where | None = None) -> L:
    """Make every packed `DenseMML` that `where(layer)` accepts trainable again, in place; returns the model.

    The float kernels have the codes and scales of before, so packing again gives the same bits.
    """
    for layer in _chosen(model, where):
        layer.unpack()
    _begin_anew(model)
    return model


def is_packed(model: Any) -> bool:
    """Whether any layer of the model is packed."""
    return any(layer.packed for layer in dense_layers(model))


def _chosen(model: Any, where: Where | None) -> list[DenseMML]:
    return [layer for layer in dense_layers(model) if where is None or where(layer)]


def _begin_anew(model: Any) -> None:
    """Forget what was compiled for other variables, and the optimizer's slots of them."""
    if keras.backend.backend() == "torch":
        for layer in model._flatten_layers():  # torch's list of parameters
            layer._track_variables()
    if not isinstance(model, keras.Model):
        return
    model.train_function = model.test_function = model.predict_function = None
    if model.compiled:
        if not all(layer.supports_jit for layer in model._flatten_layers()):
            model.jit_compile = False
        if model.optimizer is not None:
            model.optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
            model.optimizer.build(model.trainable_variables)
