"""Recurrent layers whose state never meets a matrix: all time steps are projected in one product, then scanned."""

import math
from typing import Any

import keras
from keras import ops

from thrifty.errors import ThriftyError
from thrifty.keras.layers.core import DenseMML, PackedParts, own_initializer, positive
from thrifty.keras.linear_recurrence import complex_product, complex_recurrence, real_product, real_recurrence

#: About how many inputs (steps x sequences x features) are projected at a time where a sequence is cut into blocks.
BLOCK_INPUTS = 1 << 19


class _Cell(PackedParts, keras.layers.Layer):
    """state_t = decay_t state_{t-1} + update_t, y_t = read(state_t, beside_t); everything but the state comes from x_t.

    A cell says what the four are, for inputs [..., d] with any leading axes, so that one text serves a step and a
    sequence. Called with inputs [B, d] and states, a list of one tensor [B, *state_shape], it takes one step, in
    `keras.layers.RNN` too.
    """

    product: Any
    recurrence: Any
    #: The decay under which a state stays what it is.
    neutral: Any
    output_size: int

    @property
    def state_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def state_size(self) -> int:
        # One state, which `keras.layers.RNN` cannot say has two axes.
        return math.prod(self.state_shape)

    def drive(self, inputs):
        """(decay, update) [..., *state_shape], float32 at least, and what `read` needs beside the state."""
        raise NotImplementedError

    def read(self, state, beside):
        """Outputs [..., units]."""
        raise NotImplementedError

    def call(self, inputs, states, training=False):
        state = states[0] if isinstance(states, list | tuple) else states
        decay, update, beside = self.drive(inputs)
        new_state = self.product(decay, ops.cast(state, decay.dtype)) + update
        return self.read(new_state, beside), [ops.cast(new_state, state.dtype)]

    def get_initial_state(self, batch_size=None):
        return [ops.zeros((batch_size, *self.state_shape), dtype=self.compute_dtype)]


class _ParallelRNN(PackedParts, keras.layers.RNN):
    """`keras.layers.RNN` for a `_Cell`: the same results, with one product for all time steps."""

    def __init__(self, cell: _Cell, **kwargs) -> None:
        super().__init__(cell, **kwargs)
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def compute_output_shape(self, sequences_shape, initial_state_shape=None):
        batch, length = sequences_shape[:2]
        steps = (length,) if self.return_sequences else ()
        output = (batch, *steps, self.cell.output_size)
        return (output, (batch, *self.cell.state_shape)) if self.return_state else output

    def inner_loop(self, sequences, initial_state, mask, training=False):
        state = initial_state[0] if isinstance(initial_state, list | tuple) else initial_state
        if tuple(state.shape[1:]) != self.cell.state_shape:
            raise ThriftyError(
                f"[{type(self).__name__}] initial_state must be [B, {self.cell.state_shape[0]}, "
                f"{self.cell.state_shape[1]}]; got {tuple(state.shape)}; give the state that return_state gave"
            )
        # Time first from here on, so that no intermediate result is transposed: [T, B, ...].
        sequences, kept = ops.moveaxis(sequences, 1, 0), _as_kept(mask)
        if self.go_backwards:
            sequences = ops.flip(sequences, 0)
            kept = None if kept is None else ops.flip(kept, 0)
        # Not where a gradient is wanted, which blocks make dear, nor for an exported model of any length or batch.
        known = all(isinstance(n, int) for n in sequences.shape)
        in_blocks = keras.config.backend() == "jax" and not training and known
        scan = self._scan_blocks if in_blocks else self._scan
        last_state, outputs = scan(sequences, ops.cast(state, _exact(state)), kept)
        if self.return_sequences:
            outputs = ops.moveaxis(outputs if kept is None else self._mask_outputs(outputs, kept), 0, 1)
        else:
            outputs = self._last_output(last_state, sequences, kept)[:, None]
        return outputs[:, -1], outputs, [last_state]

    def _scan(self, sequences, state, kept):
        """The state after all steps, and with return_sequences all outputs."""
        cell = self.cell
        decay, update, beside = cell.drive(sequences)
        if kept is not None:
            decay = ops.where(kept[..., None, None], decay, ops.cast(cell.neutral, decay.dtype))
            update = ops.where(kept[..., None, None], update, ops.zeros_like(update))
        states = cell.recurrence(decay, update, state)
        return states[-1], cell.read(states, beside) if self.return_sequences else None

    def _scan_blocks(self, sequences, state, kept):
        """`_scan`, one block of steps after the other: what each computes on the way stays in the cache."""
        length, batch, features = sequences.shape
        # No shorter than 16 steps: so many at least are what makes a product of all steps worth it.
        count = -(-length // max(BLOCK_INPUTS // max(1, batch * features), 16))
        if count == 1:
            return self._scan(sequences, state, kept)
        size = -(-length // count)
        missing = count * size - length
        if missing:
            kept = ops.ones((length, batch), "bool") if kept is None else kept
            kept = ops.pad(kept, [(0, missing), (0, 0)])
            sequences = ops.pad(sequences, [(0, missing), (0, 0), (0, 0)])

        def blocks(x):
            return None if x is None else ops.reshape(x, (count, size, *x.shape[1:]))

        def body(state, block):
            return self._scan(block[0], state, block[1])

        state, outputs = ops.scan(body, state, (blocks(sequences), blocks(kept)))
        return state, None if outputs is None else ops.reshape(outputs, (-1, *outputs.shape[2:]))[:length]

    def _mask_outputs(self, outputs, kept):
        """At a masked step the output of the last step that was not, as Keras has it, or zeros."""
        if self.zero_output_for_mask:
            return ops.where(kept[..., None], outputs, ops.zeros_like(outputs))
        counts = ops.cumsum(ops.cast(kept, "int32"), 0)
        length = ops.shape(kept)[0]
        order = ops.argsort(_positions(kept) + ops.where(kept, 0, length), 0)  # kept steps first, in order
        latest = ops.take_along_axis(order, ops.maximum(counts - 1, 0), 0)
        outputs = ops.take_along_axis(outputs, latest[..., None], 0)
        return ops.where((counts > 0)[..., None], outputs, ops.zeros_like(outputs))

    def _last_output(self, state, sequences, kept):
        """The last output alone: later masked steps have left the state as it was."""
        if kept is None:
            return self.cell.read(state, self.cell.drive(sequences[-1])[2])
        latest = ops.max(ops.where(kept, _positions(kept), 0), 0)
        inputs = ops.take_along_axis(sequences, latest[None, :, None], 0)[0]
        output = self.cell.read(state, self.cell.drive(inputs)[2])
        shown = kept[-1] if self.zero_output_for_mask else ops.any(kept, 0)
        return ops.where(shown[:, None], output, ops.zeros_like(output))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["cell"]
        cell = self.cell.get_config()
        return {**config, **{key: cell[key] for key in cell if key not in ("name", "trainable", "dtype")}}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


def _exact(x):
    """What a state is computed in."""
    return keras.backend.result_type(x.dtype, "float32")


def _as_kept(mask):
    if isinstance(mask, list | tuple):
        mask = mask[0]
    if mask is None:
        return None
    return ops.transpose(ops.cast(mask if len(mask.shape) == 2 else mask[..., 0], "bool"))


def _positions(kept):
    return ops.cumsum(ops.ones_like(kept, "int32"), 0) - 1


def _check_gru(layer: str, units: int, num_heads: int) -> None:
    positive(layer, "units", units)
    positive(layer, "num_heads", num_heads)
    if units % num_heads:
        raise ThriftyError(f"[{layer}] units must be a multiple of num_heads = {num_heads}; got {units}; change either")


@keras.saving.register_keras_serializable(package="thrifty")
class GRUCellMML(_Cell):
    """h_t = f_t * h_{t-1} + (1 - f_t) * c_t,  y_t = W_o (g_t * h_t) + b_o (MatMul-free LM, arXiv 2406.02528, 3.3.1).

    f = s(W_f x + b_f), c = tau(W_c x + b_c), g = s(W_g x + b_g), s `recurrent_activation`, tau `activation`. Ternary
    (`DenseMML`) are W_f and W_c, as one layer "kernel"; with fully_mml W_g, in the same layer, and W_o too, which are
    plain `Dense` layers "data_gate" and "output_gate" otherwise: quantised outputs are coarse.

    One step: inputs [B, d] and states, a list of one tensor [B, num_heads, units / num_heads], give outputs
    [B, units] and the list of the next state. Heads give the state its shape and change no number.
    Raises ThriftyError where units or num_heads is no positive integer, or one no multiple of the other.
    """

    product = staticmethod(real_product)
    recurrence = staticmethod(real_recurrence)
    neutral = 1.0

    def __init__(
        self,
        units,
        fully_mml=False,
        num_heads=1,
        activation="silu",
        recurrent_activation="sigmoid",
        use_bias=True,
        weights_initializer="glorot_uniform",
        bias_initializer="zeros",
        weights_regularizer=None,
        bias_regularizer=None,
        weights_constraint=None,
        bias_constraint=None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        _check_gru(type(self).__name__, units, num_heads)
        self.units = self.output_size = units
        self.fully_mml = fully_mml
        self.num_heads = num_heads
        self.activation = keras.activations.get(activation)
        self.recurrent_activation = keras.activations.get(recurrent_activation)
        self.use_bias = use_bias
        self.weights_initializer = keras.initializers.get(weights_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.weights_regularizer = keras.regularizers.get(weights_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.weights_constraint = keras.constraints.get(weights_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.kernel = self._dense(DenseMML, (3 if fully_mml else 2) * units, "kernel")
        plain = DenseMML if fully_mml else keras.layers.Dense
        self.data_gate = None if fully_mml else self._dense(plain, units, "data_gate", self.recurrent_activation)
        self.output_gate = self._dense(plain, units, "output_gate")

    def _dense(self, layer: Any, units: int, name: str, activation: Any = None) -> Any:
        return layer(
            units,
            activation=activation,
            use_bias=self.use_bias,
            kernel_initializer=own_initializer(self.weights_initializer),
            bias_initializer=own_initializer(self.bias_initializer),
            kernel_regularizer=self.weights_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.weights_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )

    @property
    def state_shape(self) -> tuple[int, int]:
        return self.num_heads, self.units // self.num_heads

    def build(self, input_shape) -> None:
        self.kernel.build(input_shape)
        if self.data_gate is not None:
            self.data_gate.build(input_shape)
        self.output_gate.build((*input_shape[:-1], self.units))

    def drive(self, inputs):
        gates = self.kernel(inputs)
        gates = ops.cast(gates, _exact(gates))
        forget, candidate = gates[..., : self.units], gates[..., self.units : 2 * self.units]
        shape = (*ops.shape(forget)[:-1], *self.state_shape)
        forget = ops.reshape(self.recurrent_activation(forget), shape)
        candidate = ops.reshape(self.activation(candidate), shape)
        beside = self.recurrent_activation(gates[..., 2 * self.units :]) if self.fully_mml else inputs
        return forget, (1 - forget) * candidate, beside

    def read(self, state, beside):
        gate = beside if self.data_gate is None else self.data_gate(beside)
        state = ops.reshape(state, (*ops.shape(state)[:-2], self.units))
        return self.output_gate(ops.cast(gate, self.compute_dtype) * ops.cast(state, self.compute_dtype))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "fully_mml": self.fully_mml,
            "num_heads": self.num_heads,
            "activation": keras.activations.serialize(self.activation),
            "recurrent_activation": keras.activations.serialize(self.recurrent_activation),
            "use_bias": self.use_bias,
            "weights_initializer": keras.initializers.serialize(self.weights_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "weights_regularizer": keras.regularizers.serialize(self.weights_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "weights_constraint": keras.constraints.serialize(self.weights_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }


@keras.saving.register_keras_serializable(package="thrifty")
class GRUMML(_ParallelRNN):
    """h_t = f_t * h_{t-1} + (1 - f_t) * c_t,  y_t = W_o (g_t * h_t) + b_o (MatMul-free LM, arXiv 2406.02528, 3.3.1).

    `GRUCellMML` over sequences [B, T, d], T of any length: [B, units], or [B, T, units] with return_sequences; with
    return_state also the state [B, num_heads, units / num_heads]. Takes what `keras.layers.RNN` takes
    (return_sequences, return_state, go_backwards, stateful, unroll, zero_output_for_mask) and is called as it is, with
    initial_state and mask [B, T]: a masked step leaves the state untouched and repeats the last output.

    The same numbers as `keras.layers.RNN(GRUCellMML(...))`, which is the form for decoding step by step, from one
    product for all time steps and a scan of the state alone; there is nothing for unroll to unroll.
    Raises ThriftyError as the cell does, and for an initial_state of another shape.
    """

    def __init__(
        self,
        units,
        fully_mml=False,
        num_heads=1,
        activation="silu",
        recurrent_activation="sigmoid",
        use_bias=True,
        weights_initializer="glorot_uniform",
        bias_initializer="zeros",
        weights_regularizer=None,
        bias_regularizer=None,
        weights_constraint=None,
        bias_constraint=None,
        **kwargs,
    ) -> None:
        _check_gru(type(self).__name__, units, num_heads)
        cell = GRUCellMML(
            units,
            fully_mml=fully_mml,
            num_heads=num_heads,
            activation=activation,
            recurrent_activation=recurrent_activation,
            use_bias=use_bias,
            weights_initializer=weights_initializer,
            bias_initializer=bias_initializer,
            weights_regularizer=weights_regularizer,
            bias_regularizer=bias_regularizer,
            weights_constraint=weights_constraint,
            bias_constraint=bias_constraint,
            dtype=kwargs.get("dtype"),
            trainable=kwargs.get("trainable", True),
            name="gru_cell_mml",
        )
        super().__init__(cell, **kwargs)


def _check_lru(layer: str, units: int, state_dim: int, r_min: float, r_max: float, max_phase: float) -> None:
    positive(layer, "units", units)
    positive(layer, "state_dim", state_dim)
    if not (0 <= r_min <= r_max <= 1 and r_min < 1 and r_max > 0):
        raise ThriftyError(
            f"[{layer}] r_min and r_max must bound a ring within the unit circle; got {r_min} and {r_max}; "
            f"give 0 <= r_min <= r_max <= 1"
        )
    if not 0 < max_phase <= 2 * math.pi:
        raise ThriftyError(f"[{layer}] max_phase must be an angle in (0, 2 pi]; got {max_phase}; give radians")


@keras.saving.register_keras_serializable(package="thrifty")
class LRUCellMML(_Cell):
    """h_t = lambda h_{t-1} + gamma B x_t,  y_t = Re(C h_t) + D x_t (Linear Recurrent Unit, arXiv 2303.06349, 3.1-3.4).

    Everything of the state is complex: lambda = exp(-exp(nu_log) + i exp(theta_log)), at first uniform on the ring
    r_min <= |lambda| < r_max with phases in [0, max_phase), and gamma = exp(gamma_log), at first
    sqrt(1 - |lambda|^2). B is two ternary layers (`DenseMML`), its real and imaginary part; C and D are plain `Dense`
    layers, or ternary with fully_mml.

    One step: inputs [B, d] and states, a list of one tensor [B, 2, state_dim] (real, imaginary), give outputs
    [B, units] and the list of the next state. Raises ThriftyError where units or state_dim is no positive integer, and
    where the ring or the phase is none.
    """

    product = staticmethod(complex_product)
    recurrence = staticmethod(complex_recurrence)
    neutral = ((1.0,), (0.0,))

    def __init__(
        self, units, state_dim, fully_mml=False, r_min=0, r_max=1, max_phase=2 * math.pi, use_bias=False, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        _check_lru(type(self).__name__, units, state_dim, r_min, r_max, max_phase)
        self.units = self.output_size = units
        self.state_dim = state_dim
        self.fully_mml = fully_mml
        self.r_min = r_min
        self.r_max = r_max
        self.max_phase = max_phase
        self.use_bias = use_bias

    @property
    def state_shape(self) -> tuple[int, int]:
        return 2, self.state_dim

    def build(self, input_shape) -> None:
        # Not before the number of features is known, which the spread of B depends on.
        into = keras.initializers.RandomNormal(0.0, 1 / math.sqrt(2 * input_shape[-1]))
        out_of = keras.initializers.RandomNormal(0.0, 1 / math.sqrt(self.state_dim))
        plain = DenseMML if self.fully_mml else keras.layers.Dense
        self.B_re = self._dense(DenseMML, self.state_dim, "B_re", into)
        self.B_im = self._dense(DenseMML, self.state_dim, "B_im", into)
        self.C_re = self._dense(plain, self.units, "C_re", out_of)
        self.C_im = self._dense(plain, self.units, "C_im", out_of)
        self.D = self._dense(plain, self.units, "D", keras.initializers.GlorotNormal())
        for layer in (self.B_re, self.B_im, self.D):
            layer.build(input_shape)
        for layer in (self.C_re, self.C_im):
            layer.build((*input_shape[:-1], self.state_dim))

        # One instance gives one draw, which nu_log and gamma_log share. The ends would be infinite logarithms.
        draw = keras.initializers.RandomUniform(1e-6, 1 - 1e-6)

        def squared_radius(shape, dtype):
            return draw(shape, dtype) * (self.r_max**2 - self.r_min**2) + self.r_min**2

        def nu_log(shape, dtype=None):
            return ops.log(-0.5 * ops.log(squared_radius(shape, dtype)))

        def gamma_log(shape, dtype=None):
            return 0.5 * ops.log(1 - squared_radius(shape, dtype))

        def theta_log(shape, dtype=None):
            return ops.log(self.max_phase * keras.initializers.RandomUniform(1e-6, 1 - 1e-6)(shape, dtype))

        self.nu_log, self.theta_log, self.gamma_log = (
            self.add_weight(shape=(self.state_dim,), initializer=start, name=start.__name__, autocast=False)
            for start in (nu_log, theta_log, gamma_log)
        )

    def _dense(self, layer: Any, units: int, name: str, initializer: Any) -> Any:
        return layer(
            units,
            use_bias=self.use_bias,
            kernel_initializer=own_initializer(initializer),
            dtype=self.dtype_policy,
            name=name,
        )

    def drive(self, inputs):
        update = ops.stack([self.B_re(inputs), self.B_im(inputs)], axis=-2)
        update = ops.cast(update, _exact(update))
        nu, theta, gamma = (
            ops.exp(ops.cast(log, update.dtype)) for log in (self.nu_log, self.theta_log, self.gamma_log)
        )
        decay = ops.exp(-nu) * ops.stack([ops.cos(theta), ops.sin(theta)])
        return ops.broadcast_to(decay, ops.shape(update)), gamma * update, inputs

    def read(self, state, beside):
        state = ops.cast(state, self.compute_dtype)
        return self.C_re(state[..., 0, :]) - self.C_im(state[..., 1, :]) + self.D(beside)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "state_dim": self.state_dim,
            "fully_mml": self.fully_mml,
            "r_min": self.r_min,
            "r_max": self.r_max,
            "max_phase": self.max_phase,
            "use_bias": self.use_bias,
        }


@keras.saving.register_keras_serializable(package="thrifty")
class LRUMML(_ParallelRNN):
    """h_t = lambda h_{t-1} + gamma B x_t,  y_t = Re(C h_t) + D x_t (Linear Recurrent Unit, arXiv 2303.06349, 3.1-3.4).

    `LRUCellMML` over sequences [B, T, d], T of any length: [B, units], or [B, T, units] with return_sequences; with
    return_state also the state [B, 2, state_dim] (real, imaginary). Takes and does for the rest what `GRUMML` does.
    """

    def __init__(
        self, units, state_dim, fully_mml=False, r_min=0, r_max=1, max_phase=2 * math.pi, use_bias=False, **kwargs
    ) -> None:
        _check_lru(type(self).__name__, units, state_dim, r_min, r_max, max_phase)
        cell = LRUCellMML(
            units,
            state_dim,
            fully_mml=fully_mml,
            r_min=r_min,
            r_max=r_max,
            max_phase=max_phase,
            use_bias=use_bias,
            dtype=kwargs.get("dtype"),
            trainable=kwargs.get("trainable", True),
            name="lru_cell_mml",
        )
        super().__init__(cell, **kwargs)
