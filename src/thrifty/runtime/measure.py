"""Measuring: limits of the machine, random models, decode steps, prompts. What `thrifty bench` counts with."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty import native
from thrifty.checkpoint import DecoderConfig, Tensor, expected_tensors, read_config, save_safetensors
from thrifty.checkpoint.names import linear_weights
from thrifty.native import OpCode
from thrifty.runtime.cache import NumpyCache
from thrifty.runtime.generation import Continuation, Sampling
from thrifty.runtime.states import Layout

if TYPE_CHECKING:
    from thrifty.runtime.runtime import Runtime

#: Steps before the position at which a decode is timed.
STEPS = 16


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder with tied embeddings."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


#: Shapes of random models to time: `make demo`'s, one that the caches hold, and that of BitNet b1.58 2B4T with a
#: vocabulary of 32 000.
SIZES = {
    "demo": Size(2048, 256, 768, 6, 2, 1),
    "small": Size(8192, 384, 1024, 10, 6, 6),
    "2b": Size(32_000, 2560, 6912, 30, 20, 5),
}


def write_random(folder: Path, size: Size, seed: int = 0, **fields: object) -> Path:
    """A packed BitNet folder of random codes, to be timed; `fields` go over those of its config.json."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {
        "model_type": "bitnet",
        **vars(size),
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
        **fields,
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


def linear_operations(config: DecoderConfig) -> int:
    """Additions and multiplications of a token in the low-bit linears of all layers: two a weight."""
    return 2 * linear_weights(config)


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 64 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip().rstrip("K")) << 10 for file in sizes), default=64 << 20)


def read_buffer() -> np.ndarray:
    """Memory of which the largest cache holds a quarter, or half of the free memory where that is less."""
    wanted = max(256 << 20, 4 * last_level_cache())
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        wanted = min(wanted, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    buffer = native.aligned_empty(wanted)
    buffer.fill(1)
    return buffer


def read_bandwidth(buffer: np.ndarray, n_threads: int) -> float:
    """Bytes per second at which a buffer is read: the best of three loops."""
    return max(native.read_bandwidth(buffer, loop, n_threads) for loop in range(3))


class Limits:
    """What this machine could do at best, to be measured in turn with a model."""

    def __init__(self) -> None:
        self._buffer = read_buffer() if native.available() else None

    def __call__(self, n_threads: int) -> dict[str, float]:
        """`bandwidth` (bytes per second) and `int8_peak` (operations per second); nothing without the library."""
        if self._buffer is None:
            return {}
        return {"bandwidth": read_bandwidth(self._buffer, n_threads), "int8_peak": native.int8_peak(n_threads)}


def memory() -> dict[str, int] | None:
    """Bytes of this process: `peak`, file pages included, and `anonymous`, now; None where /proc does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    fields = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    if "VmHWM" not in fields or "RssAnon" not in fields:
        return None
    return {name: int(fields[key].split()[0]) << 10 for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


class Timer:
    """Times the steps of a runtime at any context, without reading that many tokens first."""

    def __init__(self, runtime: "Runtime") -> None:
        self._decoder: Any = runtime._decoder
        self._rng = np.random.default_rng(0)
        #: Caches of the sequences of a batch, and the positions of each that hold keys and values.
        self._caches: list[Any] = []
        self._written: list[int] = []

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of a position, in layers of attention."""
        return self._layout.keys_nbytes(native.CACHE_BLOCK) // native.CACHE_BLOCK if native.available() else 0

    @property
    def _layout(self) -> Layout:
        return self._decoder.new_cache(1).layout

    def _cached(self, positions: float) -> float:
        """Bytes that a step reads of a sequence: keys and values, and states."""
        states = self._layout.states_nbytes(int(positions)) if native.available() else 0
        return positions * self.cache_bytes + states

    def decode(self, context: int, batch: int = 1, seconds: float = 0.3) -> tuple[list[float], float]:
        """Seconds of greedy steps of `batch` sequences that end at `context` positions, and bytes that a step reads.

        The last `STEPS` positions before `context` are decoded again and again, for about `seconds`. Choosing the token
        is part of a step.
        """
        steps = min(STEPS, context)
        caches = [self._cache(index, context) for index in range(batch)]
        times: list[float] = []
        while not times or sum(times) < seconds:
            for cache in caches:
                cache.tokens[:] = [0] * (context - steps)
            runs = [Continuation([0], steps, Sampling(), self._rng, frozenset()) for _ in caches]
            for _ in range(steps):
                start = time.perf_counter()
                logits = self._decoder.advance_batch([run.seen[-1] for run in runs], caches)
                for run, row in zip(runs, logits, strict=True):
                    run.take(row)
                times.append(time.perf_counter() - start)
        positions = context - (steps - 1) / 2
        return times, self._decoder.bytes_per_token + batch * self._cached(positions)

    def overhead(self, context: int) -> float:
        """Share of a greedy step that is in none of its native ops: the call, Python, the choice of the token.

        Of several threads, the waiting of the first counts as work. Only with the native library.
        """
        program, sums = self._decoder._program, []
        times, _ = self.decode(context)
        run = program.run

        def timed(*args: Any, **options: Any) -> None:
            run(*args, timed=True, **options)
            sums.append(program.seconds.sum())

        # The clock is read in runs of its own, so that its cost is in no step that counts.
        program.run = timed
        try:
            self.decode(context)
        finally:
            del program.run
        return 1 - float(np.median(sums)) / float(np.median(times))

    def prefill(self, prompt: int) -> float:
        """Seconds to read a prompt of random tokens, up to the logits after it."""
        cache = self._cache(0, 0)
        cache.tokens.clear()
        tokens = self._rng.integers(0, self._decoder.config.vocab_size, prompt).tolist()
        start = time.perf_counter()
        self._decoder.advance(tokens, cache)
        seconds = time.perf_counter() - start
        self._written[0] = max(self._written[0], prompt)
        return seconds

    def _cache(self, index: int, positions: int) -> Any:
        """The cache of a sequence with keys and values up to `positions`: random ones where nothing was read."""
        if index == len(self._caches):
            self._caches.append(self._decoder.new_cache(self._decoder.max_context))
            self._written.append(0)
        cache, written = self._caches[index], self._written[index]
        if written < positions:
            cache.tokens[:] = [0] * written
            append_random(self._decoder, cache, positions - written, self._rng)
            self._written[index] = positions
        return cache


def append_random(decoder: Any, cache: Any, count: int, rng: np.random.Generator) -> None:
    """Append `count` positions of random keys and values to a cache, as if as many tokens had been read."""
    if isinstance(cache, NumpyCache):
        first, stop = len(cache), len(cache) + count
        for array in (*cache.keys.values(), *cache.values.values()):
            array[:, first:stop] = rng.standard_normal(array[:, first:stop].shape, np.float32)
        cache.tokens.extend([0] * count)
        return
    # Only the ops that write to the cache run, on a projection of noise.
    program = decoder._program
    writes = [i for i, op in enumerate(program.ops) if op.code in (OpCode.ROPE_CACHE, OpCode.DYNAMIC_MASK)]
    most = len(program.tokens)
    for start in range(0, count, most):
        rows = decoder._fill([([0] * min(most, count - start), cache)])
        for i in writes:
            op = program.ops[i]
            for noise in (op.p[0],) if op.code is OpCode.ROPE_CACHE else (op.p[0], op.p[3]):
                noise[:rows] = rng.standard_normal((rows, noise.shape[1]), np.float32)
            program.run(rows, 0, [cache.place], begin=i, end=i + 1)
        cache.tokens.extend([0] * rows)


def warm(model: Path) -> None:
    """Read the tensors of a folder or a GGUF file once, so that the page cache holds them."""
    for file in [model] if model.is_file() else sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and both ends of repeated measurements."""
    return {"median": float(np.median(values)), "low": float(min(values)), "high": float(max(values))}
