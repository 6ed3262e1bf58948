"""Times `thrifty.nn.use_native_kernels` beside BitNet as transformers ships it.

    python benchmarks/use_native_kernels.py [--linear-class autobitlinear] [--dtype bfloat16] [--layers 30]

A model of transformers in the shape of BitNet b1.58 2B4T (hidden 2560, intermediate 6912; --vocab 32000, where 2B4T
itself has 128256) with random ternary weights, as a folder of its linear class loads: "autobitlinear" holds codes as
floats, "bitlinear" unpacks two bits a weight at every forward. Beside it the same model with native layers; both go
through transformers' own attention, norms, cache and head, compiled where its code says so. A decode step and a
prompt (with the logits of its last token, as `generate` asks for them) are timed in turn; medians. Layers are
compared first, on the same input: the exit code is 1 if one differs by more than its floats round.
"""

import argparse
import copy
import gc
import os
import sys
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from _measure import machine_line, seconds
from torch import Tensor, nn
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights, replace_with_bitnet_linear
from transformers.models.bitnet.modeling_bitnet import BitNetRotaryEmbedding
from transformers.utils.quantization_config import BitNetQuantConfig

from thrifty import native
from thrifty.nn import use_native_kernels

LINEAR_CLASSES = ("autobitlinear", "bitlinear")
#: Most that two results differ by, as a share of the largest: what rounding the operands of a product costs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def make(layers: int, vocab: int, linear_class: str, dtype: torch.dtype) -> Any:
    """A model as transformers holds it after loading."""
    config = BitNetConfig(vocab_size=vocab, num_hidden_layers=layers, tie_word_embeddings=True)
    record = BitNetQuantConfig(linear_class=linear_class, modules_to_not_convert=["lm_head"])
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: Any = BitNetForCausalLM(config)
            replace_with_bitnet_linear(model, ["lm_head"], record)
    finally:
        torch.set_default_dtype(torch.float32)
    model.to_empty(device="cpu")
    model.model.rotary_emb = BitNetRotaryEmbedding(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, BitLinear | AutoBitLinear):
                codes = torch.randint(-1, 2, (module.out_features, module.in_features), dtype=torch.int8)
                divides = isinstance(module, BitLinear)
                module.weight.copy_(pack_weights(codes) if divides else codes)
                module.weight_scale.fill_(40.0 if divides else 0.025)
            elif name.endswith("norm"):
                module.weight.fill_(1)
        model.model.embed_tokens.weight.normal_()
    model.tie_weights()
    return model.eval()


def with_native_layers(model: Any, dtype: torch.dtype) -> tuple[Any, float]:
    """A copy that holds native layers, and the largest difference of a layer of the first block, as a share."""
    memo: dict[int, Any] = {}
    worst = 0.0
    for name, module in model.named_modules():
        if isinstance(module, BitLinear | AutoBitLinear):
            holder = nn.ModuleDict({"layer": module})
            use_native_kernels(holder)
            memo[id(module)] = holder["layer"]
            if ".0." in name:
                x = torch.randn(3, module.in_features).to(dtype)
                with torch.no_grad():
                    expected, found = module(x), holder["layer"](x)
                worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    return copy.deepcopy(model, memo), worst


class Decode:
    """A model that has read `tokens`, one step at a time."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model = model
        self.token = tokens[:, :1]
        with torch.no_grad():
            self.cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def __call__(self) -> None:
        with torch.no_grad():
            self.model(self.token, past_key_values=self.cache, use_cache=True)


def read_prompt(model: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        model(tokens, use_cache=True, logits_to_keep=1)


def in_turn(rounds: int, *functions: Any) -> list[float]:
    """Median seconds of each, called in turn after one call that is not timed."""
    for function in functions:
        function()
    times = [[seconds(function) for function in functions] for _ in range(rounds)]
    return [float(np.median(column)) for column in zip(*times, strict=True)]


def megabytes(model: Any) -> float:
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6


def measure(linear_class: str, dtype: torch.dtype, args: argparse.Namespace) -> bool:
    """Print a model's rows; whether its layers agree."""
    theirs = make(args.layers, args.vocab, linear_class, dtype)
    ours, worst = with_native_layers(theirs, dtype)
    label = f"{linear_class:13} {str(dtype).removeprefix('torch.'):8}"
    if worst > TOLERANCE[dtype]:
        print(f"wrong: {label}: a layer differs by {worst:.2g} of its largest output", file=sys.stderr)
        return False
    print(f"{label} memory    {megabytes(theirs):9.0f} MB {megabytes(ours):9.0f} MB  (layers differ by {worst:.1g})")
    before = torch.randint(0, args.vocab, (1, args.context))
    a, b = in_turn(args.rounds, Decode(theirs, before), Decode(ours, before))
    print(f"{label} decode    {a * 1e3:9.1f} ms {b * 1e3:9.1f} ms {a / b:7.1f} x", flush=True)
    for tokens in args.prompt:
        ids = torch.randint(0, args.vocab, (1, tokens))
        a, b = in_turn(max(1, args.rounds // 3), lambda: read_prompt(theirs, ids), lambda: read_prompt(ours, ids))  # noqa: B023
        print(f"{label} {tokens:4} rows {a * 1e3:9.1f} ms {b * 1e3:9.1f} ms {a / b:7.1f} x", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--linear-class", nargs="+", choices=LINEAR_CLASSES, default=list(LINEAR_CLASSES))
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=4, help="30 is the whole of 2B4T, in minutes and 9 GB")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--context", type=int, default=64, help="tokens in front of a decode step")
    parser.add_argument("--prompt", type=int, nargs="*", default=[128])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if not native.available():
        print("there is no native library to time")
        return 0
    print(machine_line())
    print(f"{args.layers} layers, vocabulary {args.vocab}, torch with {torch.get_num_threads()} threads")
    print(f"{'':32} transformers       native")
    agree = True
    for linear_class in args.linear_class:
        for dtype in args.dtype:
            agree &= measure(linear_class, getattr(torch, dtype), args)
            gc.collect()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
