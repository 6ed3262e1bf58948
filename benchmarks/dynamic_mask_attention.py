"""Times `dynamic_mask_attention` of torch beside plain causal attention and beside transformers' dense method.

    python benchmarks/dynamic_mask_attention.py [--tokens 8192] [--window 512] [--longest 65536] [--rounds 3]

Batch 1, 4 heads of 128 features, 2 kv heads, float32, from q, k, v and scores to the output. The result, and its
gradients, are first checked: against the dense method (transformers' Doge: its own `prepare_dynamic_mask`, `repeat_kv`
and scaled dot product attention) on a shorter text. Peers take turns with what they are compared to. Peak memory
is that of a process of its own. Decoding takes one token through the mixer and its cache.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _measure import machine_line, seconds
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.models.doge.modeling_doge import DogeAttention, repeat_kv

from thrifty import nn, ops

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128
#: Largest difference from the dense method, relative to its largest magnitude.
TOLERANCE = 1e-5


def inputs(tokens: int, grad: bool = False) -> list[Tensor]:
    """q, k, v and scores, as far apart as those of a trained model may be."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, HEADS, tokens, HEAD_DIM), *[(1, KV_HEADS, tokens, HEAD_DIM)] * 2, (1, KV_HEADS, tokens)]
    *qkv, scores = (torch.randn(shape, generator=generator) for shape in shapes)
    return [t.requires_grad_(grad) for t in (*qkv, scores.exp())]


def ours(leaves: list[Tensor], window: int) -> Tensor:
    q, k, v, scores = leaves
    return ops.dynamic_mask_attention(q, k, v, scores, window)


def plain(leaves: list[Tensor]) -> Tensor:
    q, k, v, _ = leaves
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense(leaves: list[Tensor], window: int) -> Tensor:
    """transformers' method from q, k, v and scores on: a causal mask, `topk` of every row of it, dense attention."""
    q, k, v, scores = leaves
    causal = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool).tril()
    # It asks of `self` nothing, and of the hidden states their dtype and length.
    hidden: Any = SimpleNamespace(dtype=q.dtype, shape=(1, q.shape[2]))
    mask = DogeAttention.prepare_dynamic_mask(SimpleNamespace(), hidden, scores, window, causal)  # pyright: ignore
    groups = HEADS // KV_HEADS
    k, v, mask = (repeat_kv(t, groups) for t in (k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def in_turns(*functions: Callable[[], object], rounds: int) -> list[float]:
    """Median seconds of each; they take turns, so that whatever else the machine does meets all of them.

    In its turn each runs twice and the second time counts: the first one asks for memory that another gave back.
    """

    def second(function: Callable[[], object]) -> float:
        function()
        return seconds(function)

    times = [[second(function) for function in functions] for _ in range(rounds)]
    return [float(median) for median in np.median(times, axis=0)]


def check(tokens: int, window: int) -> float:
    """Largest relative difference of the output and of every gradient from the dense method's."""
    results = []
    for function in (ours, dense):
        leaves = inputs(tokens, grad=True)
        y = function(leaves, window)
        generator = torch.Generator().manual_seed(1)
        results.append([y, *torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=generator))])
    pairs = zip(*results, strict=True)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


def backward(function: Callable[[list[Tensor]], Tensor], leaves: list[Tensor]) -> None:
    y = function(leaves)
    torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)


def peak_bytes(tokens: int, window: int) -> int:
    """Peak resident bytes of a process that runs forward and backward once, above those of a short run before it."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import dynamic_mask_attention as m\n"
        "peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        f"run = lambda tokens: m.backward(lambda leaves: m.ours(leaves, {window}), m.inputs(tokens, grad=True))\n"
        f"run({window}); before = peak(); run({tokens}); print(peak() - before)"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) * 1024


def decoding(context: int, window: int) -> tuple[Callable[[], object], int]:
    """A step of the mixer after so many tokens, and the bytes of its cache."""
    torch.manual_seed(0)
    mixer = nn.DynamicMaskAttention(HEADS * HEAD_DIM, HEADS, KV_HEADS, window=window).eval()
    torch.nn.init.normal_(mixer.A)
    cache: Any = Cache(layers=[nn.DynamicMaskLayer()])
    with torch.no_grad():
        for start in range(0, context, 4096):
            mixer(torch.randn(1, min(4096, context - start), HEADS * HEAD_DIM), None, None, cache)
    token = torch.randn(1, 1, HEADS * HEAD_DIM)

    def steps() -> None:
        with torch.no_grad():
            for _ in range(100):
                mixer(token + torch.randn_like(token), None, None, cache)

    steps()
    return steps, sum(slots.nbytes for slots in cache.layers[0].slots)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--longest", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokens, window, longest, rounds = args.tokens, args.window, args.longest, args.rounds
    print(f"{machine_line()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    difference = check(4 * window, window)
    print(f"checked on {4 * window} tokens: differs from the dense method by {difference:.1e}, gradients included")
    if not difference < TOLERANCE:
        print(f"wrong: more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1

    leaves, training = inputs(tokens), inputs(tokens, grad=True)
    print(f"\n{tokens} tokens, window {window}           ours         peer   times faster")
    mine, sdpa = in_turns(lambda: ours(leaves, window), lambda: plain(leaves), rounds=2 * rounds)
    print(f"forward, plain causal SDPA    {mine * 1e3:8.1f} ms  {sdpa * 1e3:8.1f} ms  {sdpa / mine:10.2f}")
    mine, slow = in_turns(lambda: ours(leaves, window), lambda: dense(leaves, window), rounds=1)
    print(f"forward, transformers' method {mine * 1e3:8.1f} ms  {slow * 1e3:8.1f} ms  {slow / mine:10.2f}")
    mine, sdpa = in_turns(
        lambda: backward(lambda x: ours(x, window), training), lambda: backward(plain, training), rounds=rounds
    )
    print(f"and backward, plain SDPA      {mine * 1e3:8.1f} ms  {sdpa * 1e3:8.1f} ms  {sdpa / mine:10.2f}")

    longer = inputs(longest)
    short_time, long_time = in_turns(lambda: ours(leaves, window), lambda: ours(longer, window), rounds=rounds)
    growth = long_time / short_time / (longest / tokens)
    print(
        f"\nforward, {tokens} to {longest} tokens: {long_time / short_time:.2f} times the time, {growth:.2f} of linear"
    )
    if Path("/proc/self/status").exists():
        small, large = peak_bytes(tokens, window), peak_bytes(longest, window)
        print(
            f"forward and backward, peak memory: {small >> 20} MiB to {large >> 20} MiB, {large / small:.2f} times, "
            f"{large / small / (longest / tokens):.2f} of linear"
        )

    (near, near_bytes), (far, far_bytes) = decoding(window, window), decoding(longest, window)
    near_time, far_time = in_turns(near, far, rounds=4 * rounds)
    print(
        f"\na decoded token: {near_time * 1e4:.0f} us at {window} tokens of context, {far_time * 1e4:.0f} us at "
        f"{longest}, {far_time / near_time:.3f} times; cache {near_bytes} and {far_bytes} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
