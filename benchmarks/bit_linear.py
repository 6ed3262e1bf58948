"""Times a training step of `BitLinear`, forward and backward, beside `nn.Linear` of the same dtype.

    python benchmarks/bit_linear.py [--rows 2048 512] [--shape 1024 4096] [--rounds 9]

The layers take turns, so that whatever else the machine does meets both; medians. Results are checked first: the
forward against the spec, gradients against those of the product of the dequantised codes. bfloat16 is autocast, as
models are trained; "compiled" is the same layer through `torch.compile` (a C++ compiler is needed).
"""

import argparse
import sys
from typing import Any

import numpy as np
import torch
from _measure import machine_line, seconds
from torch import Tensor, nn

from thrifty import spec
from thrifty.nn import BitLinear


def step(layer: Any, x: Tensor, grad: Tensor, bf16: bool) -> Tensor:
    """Forward and backward; the output."""
    layer.zero_grad()
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    y.backward(grad.to(y.dtype))
    return y


def is_right(layer: BitLinear, x: Tensor, grad: Tensor) -> bool:
    """Whether the forward is the spec's, and gradients go straight through."""
    y = step(layer, x, grad, False).detach().numpy()
    w = layer.weight.detach().numpy()
    scale = spec.absmean(w, np, spec.round_bf16)
    codes = spec.ternary_codes(w, scale, np)
    x_codes, x_scales = spec.quantize_per_token(x.detach().numpy(), norm=False)
    expected = spec.ternary_matmul(x_codes, x_scales, codes.astype(np.int8), np.atleast_1d(np.float32(scale)))
    through = grad.numpy().T @ (x_codes * x_scales[:, None])
    close = np.allclose(layer.weight.grad.numpy(), through, rtol=1e-3, atol=1e-3 * np.abs(through).max())  # pyright: ignore
    return bool(np.array_equal(y, expected) and close)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 4096], metavar=("IN", "OUT"))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    d, out = args.shape
    torch.manual_seed(0)
    dense, ours = nn.Linear(d, out, bias=False), BitLinear(d, out, bias=False, norm=None)
    compiled = torch.compile(ours)
    if not is_right(ours, torch.randn(64, d, requires_grad=True), torch.randn(64, out)):
        print("wrong: BitLinear is not what the spec says", file=sys.stderr)
        return 1
    print(machine_line())
    print(f"{d} -> {out}, torch with {torch.get_num_threads()} threads; ms of forward and backward")
    print("  rows  dtype    nn.Linear  BitLinear  compiled    times nn.Linear, compiled")
    for rows in args.rows:
        for bf16 in (False, True):
            x, grad = torch.randn(rows, d, requires_grad=True), torch.randn(rows, out)
            layers = (dense, ours, compiled)
            for layer in layers:
                step(layer, x, grad, bf16)
            times = [[seconds(lambda: step(layer, x, grad, bf16)) for layer in layers] for _ in range(args.rounds)]  # noqa: B023
            a, b, c = np.median(times, axis=0) * 1e3
            dtype = "bf16" if bf16 else "fp32"
            print(f"{rows:6}  {dtype:6} {a:10.1f} {b:10.1f} {c:9.1f} {b / a:12.2f} {c / a:9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
