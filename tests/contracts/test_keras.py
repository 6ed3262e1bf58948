"""Every Keras layer against the spec, on the same arrays, on the backend that KERAS_BACKEND names."""

import keras
import numpy as np
import pytest
import torch
from keras import ops

from thrifty import nn, spec
from thrifty.keras.layers import (
    GLUMML,
    GRUMML,
    LRUMML,
    CachedMultiHeadAttention,
    CrossDomainMoE,
    DenseMML,
    DynamicMaskAttention,
    FeedForwardGate,
    RMSNorm,
    RotaryPositionalEmbedding,
)
from thrifty.keras.layers.dynamic_mask_attention import dynamic_mask_attention

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def close(actual, expected: np.ndarray, tolerance: float = spec.TOLERANCES["float32"], least: float = 0) -> None:
    """Equal but for that share of the largest magnitude, or of `least` where all is smaller."""
    atol = tolerance * max(least, np.abs(expected).max())
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (2, 3, 257), (2, 2, 2, 500)])
def test_rms_norm(shape):
    x, layer = array(*shape), RMSNorm()
    layer.build(shape)
    layer.gain.assign(array(shape[-1]))
    close(layer(x), spec.rms_norm(x, ops.convert_to_numpy(layer.gain)))


def dense(x: np.ndarray, layer: DenseMML) -> np.ndarray:
    """What a layer must answer, by the spec."""
    kernel, gain = (None if v is None else ops.convert_to_numpy(v) for v in (layer.kernel, layer.gain))
    scale = spec.absmean(kernel, np, spec.round_bf16)
    codes = spec.ternary_codes(kernel, scale, np).astype(np.int8).T
    bias = None if layer.bias is None else ops.convert_to_numpy(layer.bias)
    x_codes, x_scales = spec.quantize_per_token(x.reshape(-1, x.shape[-1]), gain, norm=layer.norm)
    return spec.ternary_matmul(x_codes, x_scales, codes, scale, bias).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("shape", "units"), [((1, 1), 3), ((4, 63), 257), ((2, 3, 500), 63), ((1, 257), 1)])
def test_dense_and_its_packed_form(norm, shape, units):
    x, layer = array(*shape), DenseMML(units, norm=norm, bias_initializer="random_normal")
    layer.build(shape)
    if norm:
        layer.gain.assign(array(shape[-1]))
    expected = dense(x, layer)
    close(layer(x), expected)
    layer.pack()
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), expected)


@pytest.mark.parametrize("offset", [0, 1, 700])
def test_rotary_positional_embedding(offset):
    x = array(2, 63, 3, 16)
    tables = spec.rope_tables(np.arange(offset, offset + 63), 16, 500_000.0)
    close(RotaryPositionalEmbedding(max_wavelength=500_000.0)(x, offset=offset), spec.apply_rope(x, *tables))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 4)])
def test_cached_multi_head_attention(heads, kv_heads):
    """With projections that only tell the heads apart, it is the spec's attention."""
    T, cached, d = 5, 58, 10
    q, k, v = array(T + cached, heads, d), array(T + cached, kv_heads, d), array(T + cached, kv_heads, d)
    layer = CachedMultiHeadAttention(heads, d, use_bias=False, num_kv_heads=kv_heads)
    query, key, value = (x.reshape(1, T + cached, -1) for x in (q, k, v))
    layer.build(query.shape, value.shape, key.shape)
    for kernel in layer.weights:
        width = heads * d if kernel.shape[0] in (heads, heads * d) else kv_heads * d
        kernel.assign(np.eye(width).reshape(kernel.shape))
    whole, _ = layer(query, value, key)
    close(whole[0], spec.attention(q, k, v, 0).reshape(T + cached, -1))
    _, cache = layer(query[:, :cached], value[:, :cached], key[:, :cached], cache=layer.create_cache(1, 64), step=0)
    output, _ = layer(query[:, cached:], value[:, cached:], key[:, cached:], cache=cache, step=cached)
    close(output[0], spec.attention(q[cached:], k, v, cached).reshape(T, -1))


def compiled(function):
    """As the backend's compiler makes it; torch runs it as it is."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


def with_gradients(layer: keras.layers.Layer, x: np.ndarray, g: np.ndarray, **options) -> tuple[np.ndarray, list]:
    """y = layer(x), and the gradients of sum(g y) by x and by each trainable variable."""
    variables = layer.trainable_variables
    if keras.backend.backend() == "jax":
        import jax

        def total(x, values):
            y, _ = layer.stateless_call(values, [v.value for v in layer.non_trainable_variables], x, **options)
            return (y * g).sum(), y

        differentiate = compiled(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, y), (by_x, by_values) = differentiate(x, [v.value for v in variables])
        return y, [by_x, *by_values]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        def differentiate(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, **options)
                total = tf.reduce_sum(y * g)
            return y, [tf.convert_to_tensor(t) for t in tape.gradient(total, [x, *(v.value for v in variables)])]

        return compiled(differentiate)(tf.constant(x))
    leaf = torch.tensor(x, requires_grad=True)
    y = layer(leaf, **options)
    return y, list(torch.autograd.grad((y * torch.from_numpy(g)).sum(), [leaf, *(v.value for v in variables)]))


def is_kernel(variable: keras.Variable) -> bool:
    """Whether torch has it transposed."""
    return variable.name == "kernel"


def same_as_torch(layer, module, pairs, x: np.ndarray, options: dict, given: dict) -> None:
    """Outputs and all gradients. pairs: variables of Keras and parameters of torch."""
    for variable, parameter in pairs:
        value = parameter.detach().numpy()
        variable.assign(value.T if is_kernel(variable) else value)
    g = array(*x.shape)
    y, (by_x, *by_variables) = with_gradients(layer, x, g, **options)
    leaf = torch.tensor(x, requires_grad=True)
    expected = module(leaf, **given)
    (expected * torch.from_numpy(g)).sum().backward()
    expected = expected.detach().numpy()
    # Gradients are sums over tokens of terms that cancel in part; some, as that of the bias of keys, cancel to zero.
    tolerance = 3 * spec.TOLERANCES["float32"]
    if layer.projections.linear == "ternary":
        # What goes into the last projection differs in its last bit, and may get the next code where it lies at a tie:
        # few tokens, by one step of 127 or so.
        tolerance = 2e-2
        off = np.abs(ops.convert_to_numpy(y) - expected).max(-1) > spec.TOLERANCES["float32"] * np.abs(expected).max()
        assert off.mean() <= 0.05
        close(y, expected, tolerance)
    else:
        close(y, expected)
    close(by_x, leaf.grad.numpy(), tolerance)
    parameters = {id(variable): parameter for variable, parameter in pairs}
    for variable, gradient in zip(layer.trainable_variables, by_variables, strict=True):
        parameter = parameters.get(id(variable))
        if parameter is not None:
            wanted = parameter.grad.numpy()
            close(gradient, wanted.T if is_kernel(variable) else wanted, tolerance, least=1)


@pytest.fixture
def drawn_alike():
    """The same arrays and parameters in every run."""
    before, RNG.bit_generator.state = RNG.bit_generator.state, np.random.default_rng(0).bit_generator.state
    torch.manual_seed(0)
    yield
    RNG.bit_generator.state = before


def linear_pairs(dense, module) -> list:
    pairs = [(dense.kernel, module.weight)]
    return pairs if module.bias is None else [*pairs, (dense.bias, module.bias)]


@pytest.mark.parametrize(
    ("T", "heads", "kv_heads", "score_heads", "window"),
    [
        (1, 2, 1, 2, 1),
        (63, 4, 2, 2, 5),
        (257, 4, 2, 4, 17),
        (257, 2, 2, 2, 100),
        (500, 2, 1, 1, 128),
        (63, 3, 3, 3, None),
    ],
)
@pytest.mark.filterwarnings("ignore:You are using a softmax over axis -1")
def test_dynamic_mask_attention(T, heads, kv_heads, score_heads, window):
    q, k, v, scores = (
        array(2, T, heads, 10),
        array(2, T, kv_heads, 10),
        array(2, T, kv_heads, 10),
        array(2, T, score_heads),
    )
    scores[:, ::3] = 0.5
    attend = compiled(lambda *tensors: dynamic_mask_attention(*tensors, window))
    y = attend(*(ops.convert_to_tensor(t) for t in (q, k, v, scores)))
    for arrays, answer in zip(zip(q, k, v, scores, strict=True), y, strict=True):
        close(answer, spec.dynamic_mask_attention(*arrays, window))


@pytest.mark.parametrize("linear", ["dense", "ternary"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2, "window": 9, "use_bias": True},
        {"num_kv_heads": 1, "window": 70, "dt_heads": "attention", "rope_theta": 500.0},
        {"selection": "none", "qk_norm": True, "sub_norm": True},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.usefixtures("drawn_alike")
def test_dynamic_mask_attention_as_in_torch(linear, options, padded):
    T, d, heads, key_dim = 100, 24, 4, 6
    x, mask = array(2, T, d), np.ones((2, T), bool)
    mask[0, :30] = mask[1, 80:] = not padded
    layer = DynamicMaskAttention(heads, key_dim, linear=linear, **options)
    layer.build((None, None, d))
    shared = {
        name: options[name] for name in ("window", "selection", "dt_heads", "qk_norm", "sub_norm") if name in options
    }
    module = nn.DynamicMaskAttention(
        *(d, heads, options.get("num_kv_heads"), key_dim),
        bias=options.get("use_bias", False),
        weight=linear,
        **shared,
    )
    torch.nn.init.normal_(module.A)
    names = ("q_proj", "k_proj", "v_proj", "dt_proj", "o_proj")
    pairs = [pair for name in names for pair in linear_pairs(getattr(layer, name), getattr(module, name))]
    pairs.append((layer.A, module.A))
    for ours, theirs in ((layer.q_norm, module.q_norm), (layer.k_norm, module.k_norm)):
        pairs += [] if theirs is None else [(ours.gain, torch.nn.init.normal_(theirs.weight))]
    if module.attn_sub_norm is not None:
        pairs.append((layer.attn_sub_norm.gain, torch.nn.init.normal_(module.attn_sub_norm.weight)))
    rotary = None
    if "rope_theta" in options:
        tables = spec.rope_tables(np.arange(T), key_dim, options["rope_theta"])
        rotary = tuple(torch.from_numpy(table) for table in tables)
    given = {"rotary": rotary, "mask": torch.from_numpy(mask) if padded else None}
    same_as_torch(layer, module, pairs, x, {"mask": mask} if padded else {}, given)


@pytest.mark.parametrize("linear", ["dense", "ternary"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 3, "norm_topk_prob": True},
        {"router": "linear", "use_bias": False},
        {"experts_per_head": 49, "activation": "gelu", "router_aux_loss_coef": 0.5},
    ],
)
@pytest.mark.usefixtures("drawn_alike")
def test_cross_domain_moe_as_in_torch(linear, options):
    d, arguments = 24, {"num_experts": 49, "experts_per_head": 5, "key_dim": 8, "intermediate_dim": 40, **options}
    x, layer = array(2, 10, d), CrossDomainMoE(linear=linear, **arguments)
    layer.build((None, None, d))
    module = nn.CDMoE(
        *(d, arguments.get("activation", "silu"), 40, 8, 49),
        *(arguments.get("num_heads", 1), arguments["experts_per_head"]),
        router=arguments.get("router", "product_key_heads"),
        norm_topk_prob=arguments.get("norm_topk_prob", False),
        bias=arguments.get("use_bias", True),
        weight=linear,
    )
    names = ("gate_proj", "up_proj", "down_proj")
    pairs = [pair for name in names for pair in linear_pairs(getattr(layer, name), getattr(module, name))]
    pairs += [(layer.down_embed, module.down_embed.weight), (layer.up_embed, module.up_embed.weight)]
    if layer.keys is None:
        pairs.append((layer.router_proj.kernel, module.router_gate.weight))
    else:
        pairs += [(layer.router_proj.kernel, module.queries.weight), (layer.keys, module.keys)]
    same_as_torch(layer, module, pairs, x, {}, {})
    if layer.router_aux_loss_coef:
        layer(x)
        _, logits = module(torch.from_numpy(x), output_router_logits=True)
        loss = nn.load_balance_loss(logits, layer.experts_per_head)
        close(layer.losses[-1], 0.5 * loss.detach().numpy())


def close_but_for_ties(actual, expected: np.ndarray) -> None:
    """What was quantised after a sum in another order: a value at a tie gets either code, which moves its row a bit."""
    difference = np.abs(ops.convert_to_numpy(actual) - expected) / np.abs(expected).max()
    assert np.mean(difference > spec.TOLERANCES["float32"]) < 0.02
    assert difference.max() < 0.02


def plain_or_ternary(x: np.ndarray, layer) -> np.ndarray:
    if isinstance(layer, DenseMML):
        return dense(x, layer)
    kernel, bias = (None if v is None else ops.convert_to_numpy(v) for v in (layer.kernel, layer.bias))
    return x @ kernel if bias is None else x @ kernel + bias


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "gelu", "silu"])
def test_glu(activation):
    x, layer = array(3, 5, 63), GLUMML(17, intermediate_size=31, activation=activation)
    layer.build(x.shape)
    gate, up = np.split(dense(x, layer.gate_and_up), 2, -1)
    close_but_for_ties(layer(x), dense(spec.glu(gate, up, activation), layer.down))


def test_feed_forward_gate():
    x, layer = array(3, 5, 63), FeedForwardGate(17, 31)
    layer.build(x.shape)
    gate, up, down = (ops.convert_to_numpy(v) for v in layer.weights)
    close(layer(x), spec.glu(x @ gate, x @ up, "gelu") @ down)


@pytest.mark.parametrize("fully_mml", [False, True])
@pytest.mark.parametrize("steps", [1, 63])
def test_gru(steps, fully_mml):
    x, state = array(2, steps, 17), array(2, 3, 5)
    layer = GRUMML(15, fully_mml, num_heads=3, bias_initializer="random_normal", return_sequences=True)
    layer.build(x.shape)
    cell, sigmoid = layer.cell, spec.ACTIVATIONS["sigmoid"]
    gates = dense(x, cell.kernel)
    f, c = sigmoid(gates[..., :15]), spec.ACTIVATIONS["silu"](gates[..., 15:30])
    g = sigmoid(gates[..., 30:] if fully_mml else plain_or_ternary(x, cell.data_gate))
    h = np.stack([spec.mlgru(*row) for row in zip(f, c, state.reshape(2, 15), strict=True)])
    close_but_for_ties(layer(x, initial_state=state), plain_or_ternary(g * h, cell.output_gate))


@pytest.mark.parametrize("fully_mml", [False, True])
@pytest.mark.parametrize("steps", [1, 63])
def test_lru(steps, fully_mml):
    x = array(2, steps, 17)
    layer = LRUMML(5, 9, fully_mml, use_bias=True, return_sequences=True)
    layer.build(x.shape)
    cell = layer.cell
    nu, theta, gamma = (np.exp(ops.convert_to_numpy(log)) for log in (cell.nu_log, cell.theta_log, cell.gamma_log))
    update = gamma * (dense(x, cell.B_re) + 1j * dense(x, cell.B_im))
    h = np.zeros((2, 9), np.complex64)
    states = np.empty((2, steps, 9), np.complex64)
    for t in range(steps):
        h = np.exp(-nu + 1j * theta) * h + update[:, t]
        states[:, t] = h
    real, imaginary = (
        plain_or_ternary(np.ascontiguousarray(part), matrix)
        for part, matrix in ((states.real, cell.C_re), (states.imag, cell.C_im))
    )
    close_but_for_ties(layer(x), real - imaginary + plain_or_ternary(x, cell.D))
