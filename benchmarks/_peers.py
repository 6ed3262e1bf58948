"""Other runtimes, each in a process of its own Python: `runtime_vs_peers.py` asks, this answers, in lines of JSON.

    python benchmarks/_peers.py llama | litespark

It knows nothing of thrifty but the folder it has packed, so that the peers' environment need not hold it. Requests and
answers are those of `thrifty.runtime.worker`.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

#: As `thrifty.runtime.measure.STEPS`.
STEPS = 16


class Packed:
    """A packed folder: its config, and its tensors as float32 and codes."""

    def __init__(self, path: str) -> None:
        self.config = json.loads((Path(path) / "config.json").read_text())
        self._bytes = np.memmap(Path(path) / "model.safetensors", np.uint8, "r")
        size = int(self._bytes[:8].view("<u8")[0])
        self._header = json.loads(bytes(self._bytes[8 : 8 + size]))
        self._start = 8 + size

    def names(self) -> Iterator[str]:
        return (name for name in self._header if name != "__metadata__")

    def shape(self, name: str) -> list[int]:
        return self._header[name]["shape"]

    def bits(self, name: str) -> np.ndarray:
        """Stored values: uint8, or uint16 for bfloat16."""
        info = self._header[name]
        first, last = info["data_offsets"]
        dtype = {"U8": "u1", "BF16": "<u2"}[info["dtype"]]
        return np.frombuffer(self._bytes[self._start + first : self._start + last], dtype).reshape(info["shape"])

    def floats(self, name: str) -> np.ndarray:
        return (self.bits(name).astype("<u4") << 16).view(np.float32)

    def codes(self, name: str) -> np.ndarray:
        """int8 [out, in] in -1, 0, 1: digit i of row r of the bytes is row i * R + r."""
        packed = self.bits(name)
        return np.concatenate([(packed >> 2 * i & 3).astype(np.int8) - 1 for i in range(4)])

    def scale(self, name: str) -> np.float32:
        """The float32 that multiplies codes."""
        return self.floats(f"{name}_scale").reshape(-1)[0]


def write_bf16(source: str, folder: str) -> None:
    """The folder with latent bfloat16 weights whose quantisation gives its codes back."""
    packed = Packed(source)
    names = [name for name in packed.names() if not name.endswith("_scale")]
    header, offset = {}, 0
    for name in names:
        shape = packed.shape(name)
        shape = [4 * shape[0], shape[1]] if f"{name}_scale" in packed._header else shape
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + 2 * int(np.prod(shape))]}
        offset = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(folder).mkdir()
    fields = packed.config | {"rope_theta": packed.config["rope_parameters"]["rope_theta"]}
    fields["quantization_config"] = fields["quantization_config"] | {"quantization_mode": "online"}
    (Path(folder) / "config.json").write_text(json.dumps(fields))
    with (Path(folder) / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if f"{name}_scale" not in packed._header:
                stream.write(packed.bits(name).tobytes())
                continue
            # Two thirds of the codes are not zero, so that their mean magnitude is the scale.
            magnitude = np.float32(1.5) * packed.scale(name)
            high = int(np.array(magnitude, "<f4").view("<u4") >> 16)
            stream.write(np.array([0, high, high | 0x8000], "<u2")[packed.codes(name)].tobytes())


class Peer:
    """What every peer is asked."""

    def __init__(self) -> None:
        #: Positions whose keys and values are in the cache.
        self.written = 0

    def write_bf16(self, source: str, folder: str) -> None:
        write_bf16(source, folder)

    def begin(self, path: str, context: int, threads: int) -> None:
        raise NotImplementedError

    def forward(self, tokens: list[int], position: int) -> np.ndarray:
        """Logits after tokens that begin at a position; what was there is forgotten."""
        raise NotImplementedError

    def load(self, path: str, context: int, threads: int) -> dict[str, float]:
        start = time.perf_counter()
        self.begin(path, context, threads)
        return {"load_seconds": time.perf_counter() - start}

    def logits(self, tokens: list[int]) -> list[float]:
        return self.forward(tokens, 0).tolist()

    def prefill(self, prompt: int) -> float:
        tokens = np.random.default_rng(0).integers(0, self.vocabulary(), prompt).tolist()
        start = time.perf_counter()
        self.forward(tokens, 0)
        seconds = time.perf_counter() - start
        self.written = prompt
        return seconds

    def decode(self, context: int, seconds: float) -> dict[str, Any]:
        """Seconds of greedy steps that end at `context`."""
        first = context - STEPS
        if self.written < first:
            self.prefill(first)
        times: list[float] = []
        while not times or sum(times) < seconds:
            token = 0
            for position in range(first, context):
                start = time.perf_counter()
                token = int(self.forward([token], position).argmax())
                times.append(time.perf_counter() - start)
        return {"seconds": times}

    def vocabulary(self) -> int:
        raise NotImplementedError

    def memory(self) -> dict[str, int]:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(fields[key].split()[0]) << 10 for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


class Llama(Peer):
    """llama.cpp through llama-cpp-python's plain bindings."""

    def begin(self, path: str, context: int, threads: int) -> None:
        self._library = llama_cpp = import_module("llama_cpp")
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, context, 512
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)

    def vocabulary(self) -> int:
        return self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))

    def tokenize(self, path: str, texts: list[str]) -> list[list[int]]:
        """Tokens of texts by the vocabulary of a file, with those that go around a text."""
        library = import_module("llama_cpp")
        options = library.llama_model_default_params()
        options.vocab_only = True
        model = library.llama_model_load_from_file(path.encode(), options)
        if not model:
            raise RuntimeError(f"llama.cpp does not load the vocabulary of {path}")
        vocabulary, found = library.llama_model_get_vocab(model), []
        for text in map(str.encode, texts):
            ids = (ctypes.c_int32 * (len(text) + 8))()
            found.append(ids[: library.llama_tokenize(vocabulary, text, len(text), ids, len(ids), True, True)])
        library.llama_model_free(model)
        return found

    def forward(self, tokens: list[int], position: int) -> np.ndarray:
        library = self._library
        library.llama_memory_seq_rm(library.llama_get_memory(self._context), 0, position, -1)
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        status = library.llama_decode(self._context, library.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary(),))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without those that begin and end one."""
        library, data = self._library, text.encode()
        tokens = (ctypes.c_int32 * (len(data) + 2))()
        vocabulary = library.llama_model_get_vocab(self._model)
        count = library.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), False, True)
        return tokens[:count]

    def score(self, tokens: list[int], windows: list[list[int]]) -> float:
        """Negative log-likelihood of tokens; windows as `thrifty.spec.windows.scoring_windows` gives them."""
        library, nats = self._library, 0.0
        for begin, scored, stop in windows:
            count = stop - 1 - begin
            library.llama_memory_clear(library.llama_get_memory(self._context), True)
            batch = library.llama_batch_init(count, 0, 1)
            batch.n_tokens = count
            for i in range(count):
                batch.token[i], batch.pos[i], batch.logits[i] = tokens[begin + i], i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            status = library.llama_decode(self._context, batch)
            library.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            logits = np.ctypeslib.as_array(library.llama_get_logits(self._context), (count, self.vocabulary()))
            logits = logits[scored - 1 - begin :].astype(np.float64)
            top = logits.max(-1)
            log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
            nats += float((log_sum - logits[np.arange(stop - scored), tokens[scored:stop]]).sum())
        return nats


class Litespark(Peer):
    """litespark-inference's torchless part, with its embedding and head at 8 bits."""

    def begin(self, path: str, context: int, threads: int) -> None:
        del threads  # OMP_NUM_THREADS says it.
        loader: Any = import_module("litespark_inference.torchless.loader")
        # It knows models by their names at a hub.
        loader._resolve_hf_snapshot = lambda _: (Path(path) / "config.json", Path(path) / "model.safetensors")
        self._runtime = import_module("litespark_inference.torchless.runtime")
        self._model = loader.load_bitnet_2b(embed_dtype="int8")
        self._state = self._runtime.init_state(self._model, t_max=context)

    def vocabulary(self) -> int:
        return self._model.config.vocab_size

    def forward(self, tokens: list[int], position: int) -> np.ndarray:
        self._state.pos = position
        if len(tokens) == 1:
            return self._runtime.forward_one(self._model, self._state, tokens[0])
        return self._runtime.forward_prefill(self._model, self._state, tokens)


def main() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    # What a library prints is no answer.
    os.dup2(2, 1)
    peer = {"llama": Llama, "litespark": Litespark}[sys.argv[1]]()
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"result": getattr(peer, request.pop("call"))(**request)}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
