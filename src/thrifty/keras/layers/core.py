"""The ternary dense layer, and the norm that it has inside."""

from collections.abc import Mapping, MutableMapping
from typing import Any

import keras
import numpy as np
from keras import activations, constraints, initializers, ops, regularizers

from thrifty.errors import ThriftyError
from thrifty.keras.backend import NATIVE_SUPPORTS_JIT, let_go
from thrifty.keras.packed_dense import KEYS, PackedDense
from thrifty.spec import quantizers


@keras.saving.register_keras_serializable(package="thrifty")
class RMSNorm(keras.layers.Layer):
    """y = x / sqrt(mean(x^2) + 1e-5) * gain + bias, over the last axis (arXiv 1910.07467).

    x: [..., d] -> [..., d]; gain and bias: [d], so any other axis may have any length. has_learnable_weights=False
    leaves both out; use_bias adds the bias. Computed in float32. Masks pass through.
    Raises ThriftyError where the last axis has no fixed length.
    """

    def __init__(
        self,
        has_learnable_weights: bool = True,
        use_bias: bool = False,
        gain_initializer: Any = "ones",
        bias_initializer: Any = "zeros",
        gain_regularizer: Any = None,
        bias_regularizer: Any = None,
        gain_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.has_learnable_weights = has_learnable_weights
        self.use_bias = use_bias
        self.gain_initializer = initializers.get(gain_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.gain_regularizer = regularizers.get(gain_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.gain_constraint = constraints.get(gain_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.supports_masking = True
        self.gain = self.bias = None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        d = features("RMSNorm", input_shape)
        if self.has_learnable_weights:
            self.gain = self.add_weight(
                shape=(d,),
                name="gain",
                autocast=False,
                initializer=self.gain_initializer,
                regularizer=self.gain_regularizer,
                constraint=self.gain_constraint,
            )
            if self.use_bias:
                self.bias = self.add_weight(
                    shape=(d,),
                    name="bias",
                    autocast=False,
                    initializer=self.bias_initializer,
                    regularizer=self.bias_regularizer,
                    constraint=self.bias_constraint,
                )

    def call(self, inputs: Any) -> Any:
        y = rms_norm(ops.cast(inputs, "float32"), self.gain)
        if self.bias is not None:
            y = y + ops.cast(self.bias, "float32")
        return ops.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        own = {"has_learnable_weights": self.has_learnable_weights, "use_bias": self.use_bias}
        return config | own | serialized(self, "gain", "bias")


@keras.saving.register_keras_serializable(package="thrifty")
class DenseMML(keras.layers.Layer):
    """y = act(float32(c_x c_W) (s_x s_W) + b): integer activations by ternary weights (b1.58, arXiv 2402.17764).

    c_x in -127 ... 127 and s_x are the absmax codes and scale of each row of rms_norm(x) * gain (of x with norm=False);
    c_W = clip(round(W / s_W), -1, 1), s_W = mean |W|. x: [..., d] -> [..., units], rank 2 or more, any axis but the
    last of any length. Variables: `kernel` W [d, units], `bias` b [units], `gain` [d]. Masks pass through.

    Gradients go straight through the quantizers: dW = (c_x s_x)^T dy, dx = dy (c_W s_W)^T. scale_gradient=True
    reproduces Keras-MML's: dW = s_W (c_x s_x)^T dy + sign(W) / N sum(dy (c_x s_x c_W)), s_W differentiated too.

    A saved layer keeps its float kernel and trains on when it is loaded. `pack` replaces the kernel by codes, 1.6 bits
    a weight in memory and in files, which the native kernels multiply; `unpack` makes it trainable again. packed=True
    builds a layer that waits for packed weights from a file. What a last layer gives is coarse: end with a `Dense`.

    Other arguments: those of `keras.layers.Dense`, as names or objects.
    Raises ThriftyError, a ValueError, where units is not a positive integer and where a file lacks a variable.
    """

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        norm: bool = True,
        scale_gradient: bool = False,
        packed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.units = positive("DenseMML", "units", units)
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.norm = norm
        self.scale_gradient = scale_gradient
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True
        self.kernel = self.bias = self.gain = None
        self._features: int | None = None
        #: What stands for the variables of a packed layer. It is one object, as compiled functions hold on to it.
        self.packed_dense = PackedDense(self.name)
        self._packed = False
        self._frozen: tuple[str, ...] = ()
        if packed:
            self.wait_for_packed()

    @property
    def packed(self) -> bool:
        """Whether the kernel is held as ternary codes, which do not train."""
        return self._packed

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self._features = features("DenseMML", input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: self._features})
        if not self.packed:
            self._add_variables()

    def call(self, inputs: Any) -> Any:
        y = self.packed_dense.on_tensor(inputs, self.units) if self.packed else self._latent_product(inputs)
        return self.activation(y if self.compute_dtype == "float32" else ops.cast(y, self.compute_dtype))

    def pack(self) -> None:
        """Replace the float kernel by ternary codes and their scale. Functions compiled before are stale.

        Raises ThriftyError where the layer is not built. Packing a packed layer does nothing.
        """
        if self.packed:
            return
        if self.kernel is None:
            raise ThriftyError(
                f"[DenseMML] a layer must be built to be packed; '{self.name}' is not; call it, or its model, once"
            )
        codes, scale = map(ops.convert_to_numpy, kernel_codes(ops.convert_to_tensor(self.kernel, "float32")))
        bias, gain = (None if v is None else ops.convert_to_numpy(v) for v in (self.bias, self.gain))
        with np.errstate(invalid="ignore"):  # codes of a kernel with a NaN, which is refused
            self.packed_dense.assign(codes.astype(np.int8).T, scale, bias, gain)
        self.wait_for_packed()

    def unpack(self) -> None:
        """Make a packed layer trainable again, with a float kernel of the same codes and scale."""
        if not self.packed:
            return
        held, latent = self.packed_dense.weights, self.packed_dense.latent()
        self._packed = False
        self.supports_jit = True
        self._tracker.unlock()
        try:
            self._add_variables()
        finally:
            self._tracker.lock()
        for name, variable in self._named_variables().items():
            variable.assign(latent if name == "kernel" else getattr(held, name))
            variable.trainable = variable.trainable and name not in self._frozen
        self.packed_dense.clear()

    def wait_for_packed(self) -> None:
        """Drop the variables, if any: packed weights are there, or about to be loaded."""
        variables = self._named_variables()
        self._frozen = tuple(name for name, variable in variables.items() if not variable.trainable and self.trainable)
        for name in variables:
            let_go(self, name)
        self._packed = True
        self.supports_jit = NATIVE_SUPPORTS_JIT

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        values = self.packed_dense.store() if self.packed else self._named_variables()
        for name, value in values.items():
            store[name] = value

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads what `save_own_variables` gave.

        A packed layer takes packed weights only. A trainable layer takes packed weights too: it gets a float kernel of
        their codes and scale. Raises ThriftyError where a variable is missing or has another shape, before any is
        changed.
        """
        if self._features is None:
            raise ThriftyError(
                f"[DenseMML] a layer must be built before weights are loaded; '{self.name}' is not; call its model once"
            )
        names = set(store.keys())
        is_packed = KEYS[-1] in names
        if self.packed and not is_packed:
            raise ThriftyError(
                f"[DenseMML] a packed layer needs packed weights; the file of '{self.name}' has a float kernel; "
                "thrifty.keras.unpack(model) before loading"
            )
        wanted = {*(KEYS if is_packed else ("kernel",)), *self._vectors()}
        if not wanted <= names:
            raise ThriftyError(
                f"[DenseMML] a file must hold {', '.join(sorted(wanted))}; that of '{self.name}' lacks "
                f"{', '.join(sorted(wanted - names))}; save the whole layer, with the same use_bias and norm"
            )
        shapes = self._vectors() | ({} if is_packed else {"kernel": (self._features, self.units)})
        values = {name: np.asarray(store[name]) for name in shapes}
        for name, shape in shapes.items():
            if values[name].shape != shape:
                raise ThriftyError(
                    f"[DenseMML] '{name}' of '{self.name}' has shape {shape}; the file's has {values[name].shape}; "
                    "build the layer as it was saved"
                )
        if is_packed:
            packed_dense = self.packed_dense if self.packed else PackedDense(self.name)
            packed_dense.restore(store, (self.units, self._features))
            if self.packed:
                return
            values["kernel"] = packed_dense.latent()
        for name, variable in self._named_variables().items():
            variable.assign(values[name])

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        own = {
            "units": self.units,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "norm": self.norm,
            "scale_gradient": self.scale_gradient,
            "packed": self.packed,
        }
        return config | own | serialized(self, "kernel", "bias")

    def _vectors(self) -> dict[str, tuple[int]]:
        """Shapes of what a layer has beside its kernel."""
        shapes = {"bias": (self.units,)} if self.use_bias else {}
        return shapes | {"gain": (self._features,)} if self.norm else shapes

    def _add_variables(self) -> None:
        self.kernel = self.add_weight(
            shape=(self._features, self.units),
            name="kernel",
            autocast=False,
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(self.units,),
                name="bias",
                autocast=False,
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        if self.norm:
            self.gain = self.add_weight(shape=(self._features,), name="gain", autocast=False, initializer="ones")

    def _named_variables(self) -> dict[str, Any]:
        named = {"kernel": self.kernel, "bias": self.bias, "gain": self.gain}
        return {name: variable for name, variable in named.items() if variable is not None}

    def _latent_product(self, x: Any) -> Any:
        x = ops.cast(x, "float32")
        if self.norm:
            x = rms_norm(x, self.gain)
        x_codes, x_scales = quantizers.absmax_codes(ops.stop_gradient(x), ops)
        kernel = ops.cast(self.kernel, "float32")
        codes, scale = kernel_codes(ops.stop_gradient(kernel))
        if self.scale_gradient:
            mean = ops.maximum(ops.mean(ops.abs(kernel)), quantizers.EPS)
            codes, scale = _straight_through(kernel, codes), _straight_through(mean, scale)
        else:
            codes = _straight_through(kernel / scale, codes)
        x_codes = _straight_through(x / x_scales, x_codes)
        # bfloat16 holds the codes, and loses digits of their sums; float16 would overflow.
        dtype = "bfloat16" if self.compute_dtype == "bfloat16" else "float32"
        y = ops.matmul(ops.cast(x_codes, dtype), ops.cast(codes, dtype))
        y = ops.cast(y, "float32") * (x_scales * scale)
        return y if self.bias is None else y + ops.cast(self.bias, "float32")


class PackedParts:
    """Mixin of layers made of `DenseMML` layers: the build config of a saved one says which of them are packed."""

    def get_build_config(self) -> dict[str, Any] | None:
        config = super().get_build_config()
        if config is None:  # of a layer that is not built: with any other, Keras takes it for built
            return None
        return {**config, "packed": [i for i, layer in enumerate(dense_layers(self)) if layer.packed]}

    def build_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        packed = config.pop("packed", [])
        super().build_from_config(config)
        layers = dense_layers(self)
        for i in packed:
            layers[i].wait_for_packed()


def dense_layers(layer: Any) -> list[DenseMML]:
    """Every `DenseMML` in a layer or model, itself included, in the order of attributes."""
    return [part for part in layer._flatten_layers() if isinstance(part, DenseMML)]


def rms_norm(x: Any, gain: Any = None) -> Any:
    """y = x / sqrt(mean(x^2) + 1e-5) * gain over the last axis of float32 tensors."""
    y = x * (1 / ops.sqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + quantizers.EPS))
    return y if gain is None else y * ops.cast(gain, "float32")


def kernel_codes(kernel: Any) -> tuple[Any, Any]:
    """Codes and scale of a float32 kernel, by `thrifty.spec.quantizers`: floats in {-1, 0, 1}, and float32 []."""
    scale = quantizers.absmean(kernel, ops, _round_bf16)
    return quantizers.ternary_codes(kernel, scale, ops), scale


def features(layer: str, input_shape: tuple[int | None, ...]) -> int:
    """The length of the last axis. Raises ThriftyError where it is not fixed."""
    if input_shape[-1] is None:
        raise ThriftyError(
            f"[{layer}] the last axis must have a fixed length; got shape {tuple(input_shape)}; name it in the Input"
        )
    return input_shape[-1]


def positive(layer: str, name: str, value: Any) -> int:
    """The value. Raises ThriftyError unless it is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value <= 0:
        raise ThriftyError(
            f"[{layer}] Received an invalid value for argument `{name}`, expected a positive integer, got {value!r}"
        )
    return int(value)


def plain(value: Any) -> Any:
    """An integer of numpy's as one of Python's, and what else there is as it is."""
    return int(value) if isinstance(value, np.integer) else value


def own_initializer(initializer: Any) -> Any:
    """An initializer without a seed draws its values once and for all, so each layer gets one of its own."""
    return initializer.clone() if isinstance(initializer, initializers.Initializer) else initializer


def serialized(layer: Any, *variables: str) -> dict[str, Any]:
    """The configs of the initializers, regularizers and constraints of variables, by their names in signatures."""
    config = {}
    for kind, module in (("initializer", initializers), ("regularizer", regularizers), ("constraint", constraints)):
        for variable in variables:
            name = f"{variable}_{kind}"
            config[name] = module.serialize(getattr(layer, name))
    return config


def _straight_through(x: Any, y: Any) -> Any:
    """y, with the gradient of x. The difference is zero, so codes stay whole numbers."""
    return y + (x - ops.stop_gradient(x))


def _round_bf16(x: Any) -> Any:
    # A cast there and back may be optimised away by a compiler; Keras 3.12 views no scalar on TensorFlow.
    bits = ops.view(ops.reshape(x, (1,)), "int32")
    bits = bits + 0x7FFF + ops.bitwise_and(ops.right_shift(bits, 16), 1)
    return ops.reshape(ops.view(ops.bitwise_and(bits, -0x10000), "float32"), ())
