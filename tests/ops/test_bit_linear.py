import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from thrifty import ops, spec
from thrifty.errors import ThriftyError

KINDS = ("ternary", "binary")


def expected(x: np.ndarray, weight: torch.Tensor, kind: ops.Kind, bias=None) -> np.ndarray:
    """The spec's product; the scale is torch's, since a scale is data."""
    codes, scale = ops.quantize_weight(weight, kind)
    w = weight.detach().float().numpy()
    by_spec = spec.ternary_codes(w, scale.numpy(), np) if kind == "ternary" else spec.binary_codes(w, np)
    assert np.array_equal(codes.numpy(), by_spec)
    assert np.array_equal(scale.numpy(), spec.round_bf16(scale.numpy()))
    return spec.ternary_matmul(*spec.quantize_per_token(x, norm=False), codes.numpy(), scale.numpy(), bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cols", "rows"), [(1, 1), (3, 500), (63, 257), (257, 63), (500, 3)])
def test_forward_has_the_bits_of_the_packed_product(kind, cols, rows):
    rng = np.random.default_rng(cols)
    x = rng.standard_normal((6, cols)).astype(np.float32)
    x[0], x[1], x[2] = 0, 3e8, np.where(rng.random(cols) < 0.5, -5, 5)
    weight, bias = torch.randn(rows, cols), torch.randn(rows)
    for shape in ((6, cols), (2, 3, cols)):
        y = ops.bit_linear(torch.from_numpy(x).view(shape), weight, bias, kind)
        assert y.shape == (*shape[:-1], rows)
        assert np.array_equal(y.reshape(6, rows).numpy(), expected(x, weight, kind, bias.numpy()))


@pytest.mark.parametrize("weight", [torch.zeros(5, 7), torch.full((5, 7), -3.0), torch.full((5, 7), 1e-9)])
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_weights(weight, kind):
    x = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32)
    y = ops.bit_linear(torch.from_numpy(x), weight, None, kind)
    assert np.array_equal(y.numpy(), expected(x, weight, kind))


def test_the_widest_sums_are_exact():
    cols = 132_104
    x, weight = torch.full((1, cols), 2.0), torch.full((1, cols), 0.5)
    weight[0, 0] = 1e-3
    sum_of_codes = ops.bit_linear(x, weight) / (2 / 127) / ops.quantize_weight(weight)[1]
    assert round(sum_of_codes.item()) == 127 * (cols - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_go_straight_through(kind, dtype):
    x = torch.randn(4, 3, 31).to(dtype).requires_grad_()
    weight = torch.randn(17, 31).to(dtype).requires_grad_()
    bias = torch.randn(17).to(dtype).requires_grad_()
    grad = torch.randn(4, 3, 17).to(dtype)
    dx, dw, db = torch.autograd.grad(ops.bit_linear(x, weight, bias, kind), (x, weight, bias), grad)
    x_codes, x_scales = ops.quantize_per_token(x.view(12, 31), norm=False)
    w_codes, w_scale = ops.quantize_weight(weight, kind)
    g = grad.view(12, 17)
    assert torch.equal(dx.view(12, 31), g @ (w_codes * w_scale).to(dtype))
    assert torch.equal(dw, (g * x_scales[:, None]).to(dtype).T @ x_codes.to(dtype))
    assert torch.equal(db, g.float().sum(0).to(dtype))


def test_gradients_are_those_of_the_textbook_estimator():
    x, weight = torch.randn(5, 31, requires_grad=True), torch.randn(17, 31, requires_grad=True)
    grad = torch.randn(5, 17)
    a = 127 / x.abs().amax(-1, keepdim=True)
    x_hat = x + ((x * a).round() / a - x).detach()
    s = weight.abs().mean().bfloat16().float()
    w_hat = weight + ((weight / s).round().clamp(-1, 1) * s - weight).detach()
    textbook = torch.autograd.grad(x_hat @ w_hat.T, (x, weight), grad)
    for a, b in zip(torch.autograd.grad(ops.bit_linear(x, weight), (x, weight), grad), textbook, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_wanted_gradients_are_made():
    x, weight = torch.randn(2, 8), torch.randn(4, 8, requires_grad=True)
    ops.bit_linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_bfloat16_tensors_are_multiplied_exactly():
    x, weight = torch.randn(4, 200).bfloat16(), torch.randn(30, 200).bfloat16()
    assert torch.equal(ops.bit_linear(x, weight), ops.bit_linear(x.float(), weight.float()).bfloat16())


def test_autocast_gives_its_dtype_and_close_values():
    x, weight = torch.randn(4, 200), torch.randn(30, 200, requires_grad=True)
    exact = ops.bit_linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.bit_linear(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-2)
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_checkpointing_changes_no_gradient():
    x, weight = torch.randn(4, 20, requires_grad=True), torch.randn(30, 20, requires_grad=True)
    plain = torch.autograd.grad(ops.bit_linear(x, weight).square().sum(), (x, weight))
    again = checkpoint(ops.bit_linear, x, weight, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), (x, weight)), plain, strict=True):
        assert torch.equal(a, b)


# torch's own tracer makes a Function object, and torch warns of it.
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break():
    def loss(x, weight):
        return ops.bit_linear(ops.rms_norm(x), weight).square().sum()

    x, weight = torch.randn(2, 4, 33, requires_grad=True), torch.randn(5, 33, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), loss(x, weight))
    for a, b in zip(
        torch.autograd.grad(compiled(x, weight), (x, weight)),
        torch.autograd.grad(loss(x, weight), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_wrong_calls_are_refused():
    with pytest.raises(ThriftyError, match="kind must be one of ternary, binary; got 'octal'"):
        ops.bit_linear(torch.ones(1, 4), torch.ones(2, 4), None, "octal")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ThriftyError, match="x must have 4 features; got 5"):
        ops.bit_linear(torch.ones(1, 5), torch.ones(2, 4))
