import importlib

import numpy as np
import pytest
import torch

from thrifty import native, ops, spec
from thrifty.errors import ThriftyError

# `ops.product_key_experts` is the function.
MODULE = importlib.import_module("thrifty.ops.product_key_experts")


@pytest.fixture(params=["library", "text"])
def library(request, monkeypatch):
    """Both ways of a CPU: the native library, and torch alone."""
    if request.param == "text":
        monkeypatch.setattr(MODULE, "use_native", lambda x: False)
        monkeypatch.setattr(MODULE, "CHUNK", 700)
    elif not native.available():
        pytest.skip("there is no native library")


def operands(n=37, k=5, experts=50, d=19, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n * k)
    shapes = ((n, d), (n, k), (experts, d), (experts, d))
    x, weights, down, up = (torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes)
    indices = torch.randint(0, experts, (n, k), generator=generator)
    indices[0] = indices[0, 0]
    return x, indices, weights, down, up


def reference(x, indices, weights, down, up, act):
    hidden = torch.einsum("nd,nkd->nk", x, down[indices])
    return torch.einsum("nk,nkd->nd", ops.activation(act)(hidden) * weights, up[indices])


def gradients(function, *operands):
    leaves = [t for t in operands if isinstance(t, torch.Tensor) and t.requires_grad]
    y = function(*operands)
    return y, torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))


@pytest.mark.parametrize("act", sorted(ops.ACTIVATIONS))
@pytest.mark.parametrize(("n", "k", "experts"), [(1, 1, 1), (3, 7, 64), (37, 5, 50), (37, 5, 30)])
@pytest.mark.parametrize("sparse", [False, True])
def test_values_and_gradients(library, act, n, k, experts, sparse):
    tensors = operands(n, k, experts)
    y, grads = gradients(ops.product_key_experts, *tensors, act, sparse)
    expected, expected_grads = gradients(reference, *tensors, act)
    for actual, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual.to_dense(), wanted, rtol=1e-4, atol=1e-5 * max(1, wanted.abs().max().item()))


def test_gradients_to_double_precision():
    x, indices, weights, down, up = operands(4, 3, 40, 6, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w, d, u: ops.product_key_experts(x, indices, w, d, u, "gelu"), (x, weights, down, up)
    )


def test_sparse_gradients_hold_the_experts_touched():
    tensors = operands()
    _, (_, _, down, up) = gradients(ops.product_key_experts, *tensors, "silu", True)
    touched = tensors[1].unique()
    for grad in (down, up):
        assert grad.is_sparse
        assert grad.is_coalesced()
        assert torch.equal(grad.indices()[0], touched)


def test_an_optimizer_of_sparse_gradients_takes_them():
    x, indices, weights, down, up = operands()
    down, up = (torch.nn.Parameter(t.detach().clone()) for t in (down, up))
    before = down.detach().clone()
    ops.product_key_experts(x, indices, weights, down, up, "silu", sparse_grad=True).sum().backward()
    torch.optim.SparseAdam([down, up]).step()
    moved = (down != before).any(-1).nonzero()[:, 0]
    assert torch.equal(moved, indices.unique())


def test_what_is_kept_for_the_backward_is_small(library):
    x, indices, weights, down, up = operands(64, 16, 1024, 256)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.product_key_experts(x, indices, weights, down, up, "silu")
    tables = {down.data_ptr(), up.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in tables) <= x.numel() + 3 * indices.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_of_sixteen_bits(library, dtype):
    x, indices, weights, down, up = operands(7, 5, 400)
    down, up = down.detach().to(dtype), up.detach().to(dtype)
    y = ops.product_key_experts(x, indices, weights, down, up, "silu")
    expected = reference(x, indices, weights, down.float(), up.float(), "silu")
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("k", [1, 5, 64, 400, 600])
@pytest.mark.parametrize("tied", ["none", "coarse", "rounded", "zeros"])
def test_topk_is_that_of_the_spec(library, k, tied):
    rng = np.random.default_rng(k)
    x, y = rng.standard_normal((2, 3, 4, 25)).astype(np.float32)
    if tied == "coarse":
        x, y = np.round(x), np.round(y)
    elif tied == "rounded":  # differences of x vanish in the sums, pairs outside of the staircase among them
        x *= np.float32(1e-7)
    elif tied == "zeros":
        x, y = x * 0, -y * 0
    sums, indices = ops.product_key_topk(torch.from_numpy(x), torch.from_numpy(y), k)
    expected = spec.product_key_topk(x, y, k)
    np.testing.assert_array_equal(indices.numpy(), expected[1])
    np.testing.assert_array_equal(sums.numpy(), expected[0])


def test_topk_has_gradients(library):
    x, y = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    weights = torch.linspace(1, 2, 7)
    sums, indices = ops.product_key_topk(x, y, 7)
    grads = torch.autograd.grad((sums * weights).sum(), (x, y))
    pairs = (x[:, :, None] + y[:, None, :]).flatten(1).gather(-1, indices)
    expected = torch.autograd.grad((pairs * weights).sum(), (x, y))
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_compiler_can_trace_them():
    x, y = torch.randn(2, 4, 8)
    torch.library.opcheck(torch.ops.thrifty.product_key_topk.default, (x, y, 3))
    torch.library.opcheck(torch.ops.thrifty.product_key_experts.default, (*operands(4, 3, 40), "silu", False))


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 4)
    with pytest.raises(ThriftyError, match=r"k must be 1 to n\^2 = 16; got 17; choose fewer, or give more keys"):
        ops.product_key_topk(x, x, 17)
    with pytest.raises(ThriftyError, match="must have one shape"):
        ops.product_key_topk(x, x[:1], 1)
    x, indices, weights, down, up = operands(4, 2, 50)
    with pytest.raises(ThriftyError, match=r"must be \[N, d\], .* got \(4, 18\)"):
        ops.product_key_experts(x[:, 1:], indices, weights, down, up, "silu")
    if native.available():
        with pytest.raises(ThriftyError, match=r"numbers must be 0 to 49; got \d+ to 50"):
            ops.product_key_experts(
                x, indices.clamp(max=49).index_fill(1, torch.tensor(1), 50), weights, down, up, "silu"
            )
