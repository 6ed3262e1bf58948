"""Measuring: read bandwidth, matrix products, decode steps. What `thrifty bench` and the benchmarks count with."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thrifty import native
from thrifty.checkpoint import Tensor, expected_tensors, read_config, save_safetensors
from thrifty.runtime.runtime import Runtime


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder with tied embeddings."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


#: Shapes of random models to time.
SIZES = {
    "demo": Size(2048, 256, 768, 6, 2, 1),
    "small": Size(8192, 512, 1536, 8, 4, 2),
    "large": Size(32_000, 2048, 6144, 16, 16, 4),
}


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 64 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().rstrip("K")) << 10 for file in sizes), default=64 << 20)


def read_bandwidth(n_threads: int, nbytes: int | None = None) -> float:
    """Bytes per second at which memory is read: the best of three loops, over four times the largest cache."""
    buffer = native.aligned_empty(nbytes or max(256 << 20, 4 * last_level_cache()))
    buffer[:] = 1
    return max(native.read_bandwidth(buffer, loop, n_threads) for _ in range(4) for loop in range(3))


def matmul_seconds(
    rows: int, cols: int, n: int, weight_format: str, n_threads: int, nbytes: int, repeats: int = 3
) -> float:
    """Median time of a product of n rows with a random matrix that is not in the cache.

    Copies of the matrix, together `nbytes` or more, are multiplied in turn. The result is checked against numpy first.
    """
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (rows, cols), np.int8)
    first = native.PackedMatrix.from_codes(codes, weight_format)
    x = np.zeros((n, first.width), np.int8)
    x[:, :cols] = rng.integers(-127, 128, (n, cols), np.int8)
    scales = np.ones(n, np.float32)
    exact = x[:1, :cols].astype(np.int32) @ codes.T.astype(np.int32)
    if not np.array_equal(first.matmul(x, scales, 1.0)[:1], exact):
        raise RuntimeError(f"ternary_matmul {rows} x {cols} in {weight_format} is wrong on {native.isa()}")
    packed = native.pack(weight_format, codes)
    copies = [first]
    for _ in range(-(-nbytes // first.nbytes) - 1):
        copy = native.aligned_empty(packed.nbytes).reshape(packed.shape)
        copy[...] = packed
        copies.append(native.PackedMatrix(copy, rows, cols, weight_format))
    w_scale, out = np.ones(1, np.float32), np.empty((n, rows), np.float32)
    arguments = (x.ctypes.data, first.width, scales.ctypes.data, n, w_scale.ctypes.data, 1, None, out.ctypes.data)
    times = []
    for _ in range(repeats):
        for matrix in copies:
            start = time.perf_counter()
            if native.available():
                matrix.matmul_into(*arguments, n_threads)
            else:
                matrix.matmul(x, scales, w_scale, out=out)
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def step_seconds(runtime: Runtime, tokens: int) -> float:
    """Median time between two tokens of a greedy text, the first few left out."""
    times = [time.perf_counter()]
    for _ in runtime.stream_tokens([1, 2, 3], max_new_tokens=tokens + 5, temperature=0, ignore_eos=True):
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)[5:]))


def write_random(folder: Path, size: Size, seed: int = 0) -> Path:
    """A packed folder of random codes, to be timed."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {
        "model_type": "bitnet",
        **vars(size),
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
            tensors[name] = Tensor.of(np.full(1, 2.0 / size.hidden_size**0.5, np.float32), "BF16")
        elif len(info.shape) == 2:
            tensors[name] = Tensor.of(rng.standard_normal(info.shape, np.float32) * np.float32(0.02), "BF16")
        else:
            tensors[name] = Tensor.of(np.ones(info.shape, np.float32), "BF16")
    save_safetensors(folder / "model.safetensors", tensors)
    return folder
