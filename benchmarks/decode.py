"""Whole decode steps of random packed models, beside the bandwidth at which this machine reads memory.

    python benchmarks/decode.py [SIZE ...] [--threads 1 2] [--formats i2 base3] [--tokens 100]

A step reads every weight once, so bytes per token x tokens per second can at best be the read bandwidth. The share says
how near a step is to that; small models are held up by Python's calls between the products instead, and fit in caches.
The result is checked before anything is timed.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thrifty import native, spec
from thrifty.checkpoint import Tensor, expected_tensors, open_folder, read_config, save_safetensors
from thrifty.runtime import Runtime, load


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder with tied embeddings."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


SIZES = {
    "demo": Size(4096, 256, 768, 8, 4, 2),
    "small": Size(8192, 512, 1536, 8, 8, 4),
    "large": Size(32_000, 2048, 6144, 16, 16, 4),
}


def write_random(folder: Path, size: Size, seed: int = 0) -> Path:
    """A packed folder of random codes."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    config = {
        "model_type": "bitnet",
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    # The bytes whose four digits are all codes.
    digits = np.arange(256)[:, None] >> (2 * np.arange(4)) & 3
    valid = np.flatnonzero((digits < 3).all(1)).astype(np.uint8)
    tensors = {}
    for name, info in expected_tensors(read_config(folder / "config.json")).items():
        if info.kind == "codes":
            tensors[name] = Tensor.of(valid[rng.integers(0, len(valid), info.shape, np.uint8)])
        elif name.endswith("weight_scale"):
            tensors[name] = Tensor.of(np.full(1, 2.0 / size.hidden**0.5, np.float32), "BF16")
        elif len(info.shape) == 2:
            tensors[name] = Tensor.of(rng.standard_normal(info.shape, np.float32) * np.float32(0.02), "BF16")
        else:
            tensors[name] = Tensor.of(np.ones(info.shape, np.float32), "BF16")
    save_safetensors(folder / "model.safetensors", tensors)
    return folder


def check(folder: Path, runtime: Runtime, weight_format: str) -> None:
    """A product of one row equals the spec bit for bit, and steps choose what reading the tokens at once would."""
    config, rng = runtime.config, np.random.default_rng(1)
    codes, scale = open_folder(folder).codes("model.layers.0.mlp.down_proj", config.hidden_size)
    x_codes, x_scales = spec.quantize_per_token(rng.standard_normal((1, config.intermediate_size), np.float32))
    y = native.PackedMatrix.from_codes(codes, weight_format).matmul(x_codes, x_scales, float(scale))
    np.testing.assert_array_equal(y, spec.ternary_matmul(x_codes, x_scales, codes, float(scale)))
    tokens = rng.integers(0, config.vocab_size, 8).tolist()
    made = runtime.generate_tokens(tokens, max_new_tokens=4, temperature=0, ignore_eos=True)
    logits = runtime.logits(tokens + made)[7:-1]
    chosen = logits[np.arange(4), made]
    assert (chosen >= logits.max(-1) - 2e-2 * np.ptp(logits)).all(), "decode and prefill disagree"


def bandwidth(n_threads: int) -> float:
    """Bytes per second of the best read loop over a buffer four times the largest cache."""
    buffer = native.aligned_empty(max(256 << 20, 4 * last_level_cache()))
    buffer[:] = 1
    return max(native.read_bandwidth(buffer, loop, n_threads) for _ in range(5) for loop in range(3))


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 64 MB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().rstrip("K")) << 10 for file in sizes), default=64 << 20)


def step_seconds(runtime: Runtime, tokens: int) -> list[float]:
    """Times between tokens of one greedy text, the first few left out."""
    times = [time.perf_counter()]
    for _ in runtime.stream_tokens([1, 2, 3], max_new_tokens=tokens + 5, temperature=0, ignore_eos=True):
        times.append(time.perf_counter())
    return np.diff(times)[5:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["demo", "small"], metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, native.default_threads()}))
    parser.add_argument("--formats", nargs="+", default=["i2", "base3"])
    parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    print(f"kernels: {native.isa()}")
    reads = {n: bandwidth(n) for n in options.threads} if native.available() else {}
    for n, rate in reads.items():
        print(f"read bandwidth, {n} thread{'s' * (n > 1)}: {rate / 1e9:.1f} GB/s")
    print("size    format  threads  ms/token (best)  tokens/s  MB/token  GB/s   of bandwidth")
    for name in options.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_random(Path(temporary) / name, SIZES[name])
            for weight_format in options.formats:
                for n in options.threads:
                    runtime = load(folder, weight_format=weight_format, n_threads=n)
                    check(folder, runtime, weight_format)
                    times = step_seconds(runtime, options.tokens)
                    median, best, size = statistics.median(times), min(times), runtime.bytes_per_token
                    share = f"{100 * size / median / reads[n]:.0f} %" if n in reads else "-"
                    print(
                        f"{name:7} {weight_format:7} {n:7}  {1e3 * median:8.3f} ({1e3 * best:.3f})  {1 / median:8.0f}  "
                        f"{size / 1e6:8.2f}  {size / median / 1e9:4.1f}   {share}"
                    )


if __name__ == "__main__":
    main()
