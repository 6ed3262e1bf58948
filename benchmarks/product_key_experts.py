"""Times CDMoE beside transformers' DogeCDMoE, and by number of experts.

    python benchmarks/product_key_experts.py [--experts 4096 ...] [--peer 16384 65536]

Results are checked before they are timed: the layer with the legacy layout of scores against transformers', the routed
part against rows gathered by torch. Then medians of forward passes without gradients, peers taking turns, the inputs
another each time. "experts" is the op from given numbers and weights on, "router" what finds them; "memory" is what the
process gained at its peak over what it held with the layer made. With THP_MEM_ALLOC_ENABLE=1 in the environment torch
asks for huge pages, for tables and temporaries alike.
"""

import argparse
import resource
import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch
from _measure import machine_line, seconds
from torch import Tensor

from thrifty import nn, ops
from thrifty.nn.experts import RouterLayout, retrieve

DIM, HIDDEN, CHOSEN = 512, 1024, 64


def medians(functions: list[Callable[[Tensor], object]], inputs: list[Tensor], rounds: int) -> list[float]:
    """Median milliseconds of each, taking turns; before each turn a call on other inputs, so that none finds the caches
    and the allocator as a peer left them."""
    times: list[list[float]] = [[] for _ in functions]
    for i in range(rounds):
        x = inputs[i % len(inputs)]
        for taken, function in zip(times, functions, strict=True):
            function(inputs[(i - 1) % len(inputs)])
            taken.append(1e3 * seconds(lambda: function(x)))  # noqa: B023
    return [float(np.median(taken)) for taken in times]


def make_layer(n_experts: int, layout: RouterLayout = "per_token") -> nn.CDMoE:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.CDMoE(
            DIM, "silu", HIDDEN, None, n_experts, 1, CHOSEN, router="linear", router_layout=layout, bias=False
        ).eval()


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    worst = ((actual - expected).abs().max() / expected.abs().max()).item()
    if worst > 1e-5:
        sys.exit(f"wrong: {name} differs by {worst:.1e} of the largest value")


def beside_transformers(n_experts: int, inputs: list[Tensor], rounds: int) -> None:
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeCDMoE

    config = DogeConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, is_moe=True, num_experts=n_experts, num_experts_per_tok=CHOSEN
    )
    theirs = DogeCDMoE(config).eval()
    for table in (theirs.down_embed, theirs.up_embed):
        table.weight.mul_(DIM**-0.5)
    ours, legacy = make_layer(n_experts), make_layer(n_experts, "legacy")
    for layer in (ours, legacy):
        layer.load_state_dict(theirs.state_dict())
    check(f"{n_experts} experts", legacy(inputs[0]), theirs(inputs[0])[0])
    mine, peer = medians([ours, theirs], inputs, rounds)
    print(f"{n_experts:9} {mine:10.2f} ms {peer:12.2f} ms {peer / mine:10.1f} x")


def routed_part(n_experts: int, inputs: list[Tensor], rounds: int) -> tuple[list[float], float]:
    """Milliseconds of experts, router and both, and MiB that the process gained at its peak."""
    layer = make_layer(n_experts)
    tables = layer.down_embed.weight, layer.up_embed.weight
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen = {id(x): retrieve(layer.router_scores(x), CHOSEN) for x in inputs}

    def experts(x: Tensor) -> Tensor:
        weights, indices = chosen[id(x)]
        return ops.product_key_experts(x[0], indices, weights, *tables, "silu")

    def router(x: Tensor) -> object:
        return retrieve(layer.router_scores(x), CHOSEN)

    def everything(x: Tensor) -> Tensor:
        return layer.experts(x, layer.router_scores(x))

    x = inputs[0]
    weights, indices = chosen[id(x)]
    rows = [layer.down_embed(indices[:8]), layer.up_embed(indices[:8])]
    hidden = torch.nn.functional.silu((rows[0] @ x[0, :8, :, None])[..., 0]) * weights[:8]
    check(f"{n_experts} experts", everything(x)[0, :8], (hidden[:, None] @ rows[1])[:, 0])
    took = medians([experts, router, everything], inputs, rounds)
    return took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def by_experts(sizes: list[int], inputs: list[Tensor], rounds: int) -> None:
    routed_part(sizes[0], inputs, 2)  # what is allocated once
    first: list[float] = []
    for n_experts in sizes:
        took, gained = routed_part(n_experts, inputs, rounds)
        first = first or took
        ratios = " ".join(f"{new / old:7.2f}" for new, old in zip(took, first, strict=True))
        print(f"{n_experts:9} {took[0]:10.2f} {took[1]:8.2f} {took[2]:8.2f}    {ratios}   {gained:6.1f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--peer", type=int, nargs="*", default=[16384, 65536], help="experts, beside transformers'")
    parser.add_argument("--experts", type=int, nargs="*", default=[4096, 16384, 65536, 262144, 1048576])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(machine_line())
    torch.manual_seed(0)
    inputs = [torch.randn(1, args.tokens, DIM) for _ in range(8)]
    with torch.no_grad():
        if args.peer:
            print(f"\n{args.tokens} tokens, d {DIM}, {CHOSEN} chosen, shared MLP of {HIDDEN}")
            print("  experts      thrifty   transformers      ratio")
            for n_experts in args.peer:
                beside_transformers(n_experts, inputs, args.rounds)
        if args.experts:
            print("\nthe routed part, ms, and its growth since the first line")
            print("  experts    experts   router      all    experts  router     all   memory")
            by_experts(args.experts, inputs, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
