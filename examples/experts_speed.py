"""How long a layer of experts takes, by the number of its experts: a loop over experts, PEER and CDMoE.

    python examples/experts_speed.py [--short] [--out runs/experts_speed]

The retrieval-speed figure of Wonderful Matrices (arXiv 2412.11834) on this machine, from 16 to 1 048 576 experts of one
hidden unit each; of which a token activates a quarter, at most --chosen. Writes OUT.md, a table, and OUT.png. Needs
`thrifty[train]`; 6 GB of memory for a million experts. --short: up to 65 536 experts, under a minute.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.nn import PEER, CDMoE

SIZES = [4**exponent for exponent in range(2, 11)]
LAYERS = ("loop", "PEER", "CDMoE")


class LoopMoE(nn.Module):
    """Softmax over all experts, the best k of them, and a Python loop: what mixtures of few experts do."""

    def __init__(self, dim: int, hidden: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(dim, experts, bias=False)
        self.down = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)
        self.up = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)
        self.shared = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, indices = self.router(rows).softmax(-1).topk(self.chosen)
        y = torch.zeros_like(rows)
        for expert in range(len(self.down)):
            tokens, slots = torch.where(indices == expert)
            hidden = F.silu(rows[tokens] @ self.down[expert]) * weights[tokens, slots]
            y.index_add_(0, tokens, hidden[:, None] * self.up[expert])
        return self.shared(x) + y.view_as(x)


def make(name: str, dim: int, experts: int, chosen: int) -> nn.Module:
    if name == "loop":
        return LoopMoE(dim, 2 * dim, experts, chosen)
    if name == "PEER":
        return PEER(dim, heads=1, num_experts=experts, num_experts_per_head=chosen, activation="silu")
    return CDMoE(dim, "silu", 2 * dim, 64, experts, 1, chosen)


def milliseconds(function: Callable[[], object], budget: float) -> float:
    """Median of at least three calls, and as many as `budget` seconds hold, after one that is not counted."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def measure(args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Milliseconds of a forward pass by layer and number of experts."""
    took: dict[str, dict[int, float]] = {name: {} for name in LAYERS}
    x = torch.randn(1, args.tokens, args.dim)
    print(row(["experts", "chosen", *LAYERS]), row(["---:"] * (2 + len(LAYERS))), sep="\n")
    for experts in args.experts:
        chosen = min(experts // 4, args.chosen)
        for name in LAYERS:
            if name == "loop" and experts > args.loop:
                continue
            layer = make(name, args.dim, experts, chosen).eval()
            with torch.no_grad():
                took[name][experts] = milliseconds(lambda: layer(x), args.seconds)  # noqa: B023
        print(line(took, experts, chosen), flush=True)
    return took


def line(took: dict[str, dict[int, float]], experts: int, chosen: int) -> str:
    times = [f"{took[name][experts]:.2f}" if experts in took[name] else "" for name in LAYERS]
    return row([f"{experts}", f"{chosen}", *times])


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(took: dict[str, dict[int, float]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, times in took.items():
        axes.plot(list(times), list(times.values()), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="experts", ylabel="milliseconds", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="up to 65 536 experts, the loop up to 1024")
    parser.add_argument("--experts", type=int, nargs="+", default=SIZES, help="squares")
    parser.add_argument("--loop", type=int, default=4096, help="most experts of the loop")
    parser.add_argument("--chosen", type=int, default=64, help="most experts of a token")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.5, help="of measurement for each number")
    parser.add_argument("--out", type=Path, default=Path("runs/experts_speed"))
    args = parser.parse_args()
    if args.short:
        args.experts, args.loop = [e for e in args.experts if e <= 65536], min(args.loop, 1024)
    torch.manual_seed(0)
    took = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table = [row(["experts", "chosen", *LAYERS]), row(["---:"] * (2 + len(LAYERS)))]
    table += [line(took, experts, min(experts // 4, args.chosen)) for experts in args.experts]
    args.out.with_suffix(".md").write_text("\n".join(table) + "\n")
    title = f"forward pass, {args.tokens} tokens of width {args.dim}, {torch.get_num_threads()} threads"
    draw(took, title, args.out.with_suffix(".png"))
    print(f"wrote {args.out.with_suffix('.md')} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
