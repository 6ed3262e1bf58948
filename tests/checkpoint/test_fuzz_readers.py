"""Files that nobody wrote: readers open them or say in a sentence why not, fast, and within the memory of the file.

Run as a program it is the fuzzer of one reader, in a process of its own: `python test_fuzz_readers.py gguf FOLDER`.
"""

import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thrifty import ThriftyError, spec
from thrifty.checkpoint import Tensor, TensorToWrite, open_gguf, open_safetensors, save_gguf, save_safetensors
from thrifty.checkpoint.gguf import FLOAT_BYTES, KIND_IDS, parse_gguf

FILES = 10_000
#: Of one file, in CPU seconds, and of all of them together in memory that is not there before.
MOST_SECONDS, MOST_BYTES = 1.0, 128 << 20

COUNTS = (0, 1, 2, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
JSON = b'0123456789-[]{}",:eE. \\u'


def whole_gguf(path: Path) -> bytes:
    metadata = {
        "general.architecture": "bitnet",
        "general.alignment": np.uint32(32),
        "count": np.uint64(3),
        "eps": np.float32(1e-5),
        "flag": True,
        "tokens": ["a", "bc", "Ġd", ""],
        "scores": np.linspace(0, 1, 4, dtype=np.float32),
        "flags": np.array([True, False]),
        "nested": (np.arange(3, dtype=np.int8), (["x"], np.ones(2))),
    }
    codes = np.ones((1, 256), np.int8)
    tensors = {
        "norm": ("F32", (8,), np.ones(8, np.float32)),
        "table": ("Q8_0", (2, 32), spec.quantize_q8_0(np.ones((2, 32), np.float32))),
        **{kind: (kind, codes.shape, spec.gguf_encode(kind, codes, 1)) for kind in spec.GGUF_TERNARY},
    }
    save_gguf(path, metadata, [TensorToWrite(n, k, s, lambda d=d: d) for n, (k, s, d) in tensors.items()])
    return path.read_bytes()


def whole_safetensors(path: Path) -> bytes:
    dtypes = ("F32", "BF16", "F16", "U8")
    arrays = {f"layer.{i}": Tensor.of(np.ones((2, i + 1), np.float32), dtype) for i, dtype in enumerate(dtypes)}
    save_safetensors(path, arrays, {"format": "pt"})
    return path.read_bytes()


def mutated(rng: random.Random, whole: bytes, header: int) -> bytes:
    """A copy with a few edits, most of them in the header."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 5))):
        if not data:
            break
        at = rng.randrange(min(header, len(data)) if rng.random() < 0.9 else len(data))
        kind = rng.randrange(9)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", rng.choice(COUNTS) + rng.randint(0, 1) & 2**64 - 1)
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", rng.choice((rng.randrange(48), 2**31, 2**32 - 1)))
        elif kind == 4:
            del data[rng.randrange(len(data)) :]
        elif kind == 5:
            del data[at : at + rng.randint(1, 24)]
        elif kind == 6:
            begin = rng.randrange(len(data))
            data[at : at + rng.choice((0, 8))] = data[begin : begin + rng.randint(1, 40)]
        elif kind == 7:
            data[at] = rng.choice(JSON)
        else:
            data[: rng.randint(1, 8)] = rng.randbytes(rng.randint(0, 8))
    return bytes(data)


def read_gguf(path: Path, data: bytes) -> None:
    file = parse_gguf(data, path)
    assert sum(block.data.size for block in file.tensors.values()) <= len(data)
    for block in file.tensors.values():
        block.data.sum()
        if block.kind in FLOAT_BYTES:
            block.data.view("u2").reshape(*block.shape[:-1], -1)
    save_gguf(path, file.metadata, [])
    again = open_gguf(path).metadata
    assert again.keys() == file.metadata.keys()


def read_safetensors(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for tensor in open_safetensors(path).values():
        assert tensor.data.nbytes <= len(data)
        tensor.float32()


def fuzz(reader: str, path: Path) -> None:
    """Prints how many files were opened; fails for an error that is no sentence, a slow file, or a hungry one."""
    import resource  # Windows has none

    whole, read = {"gguf": (whole_gguf, read_gguf), "safetensors": (whole_safetensors, read_safetensors)}[reader]
    data, rng, opened = whole(path), random.Random(6), 0
    header = len(data) - (512 if reader == "gguf" else 40)
    read(path, data)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for i in range(FILES):
        mutant, begin = mutated(rng, data, header), time.process_time()
        reason = ""
        try:
            read(path, mutant)
        except ThriftyError as error:
            reason = str(error)
        opened += not reason
        assert not reason or (reason[0] == "[" and reason.count("; ") >= 2), reason
        assert time.process_time() - begin < MOST_SECONDS, f"file {i} took too long"
    print(opened)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
@pytest.mark.parametrize("reader", ["gguf", "safetensors"])
def test_ten_thousand_damaged_files(tmp_path, reader):
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else tmp_path
    path = folder / f"thrifty-{reader}-{tmp_path.parent.name}-{tmp_path.name}"
    try:
        done = subprocess.run([sys.executable, __file__, reader, path], capture_output=True, text=True, timeout=100)
    finally:
        path.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # Edits that hurt nothing exist, and are few.
    assert FILES / 100 < int(done.stdout) < FILES / 2


@given(data=st.binary(max_size=200), version=st.sampled_from([2, 3]), head=st.integers(0, 3))
@settings(max_examples=500, deadline=None)
def test_bytes_that_are_no_file(data, version, head):
    """Headers followed by anything: no bytes, magic, version, and small counts."""
    start = (b"", b"GGUF", struct.pack("<4sI", b"GGUF", version), struct.pack("<4sIQQ", b"GGUF", version, 1, 1))[head]
    reason = "x.gguf"
    try:
        parse_gguf(start + data, Path("x.gguf"))
    except ThriftyError as error:
        reason = str(error)
    assert "x.gguf" in reason


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def gguf_tensors(draw):
    kind = draw(st.sampled_from(list(KIND_IDS)))
    block = 1 if kind in FLOAT_BYTES else spec.GGUF_BLOCKS[kind].weights
    shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), block * draw(st.integers(1, 2)))
    count = int(np.prod(shape))
    size = (
        count * FLOAT_BYTES[kind]
        if kind in FLOAT_BYTES
        else spec.GGUF_BLOCKS[kind].nbytes(count // shape[-1], shape[-1])
    )
    return kind, shape, np.frombuffer(draw(st.randoms(use_true_random=False)).randbytes(size), np.uint8)


@given(tensors=st.dictionaries(names, gguf_tensors(), max_size=5), alignment=st.sampled_from([1, 8, 32, 64]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_of_any_kind_and_shape_survive_gguf(tmp_path, tensors, alignment):
    to_write = [TensorToWrite(name, kind, shape, lambda d=data: d) for name, (kind, shape, data) in tensors.items()]
    save_gguf(tmp_path / "a", {"general.alignment": np.uint32(alignment)}, to_write)
    blocks = open_gguf(tmp_path / "a").tensors
    assert list(blocks) == list(tensors)
    for name, (kind, shape, data) in tensors.items():
        assert (blocks[name].kind, blocks[name].shape) == (kind, shape)
        np.testing.assert_array_equal(blocks[name].data, data)


@given(
    tensors=st.dictionaries(
        names.filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "BOOL"]), st.lists(st.integers(0, 3), max_size=4)
        ),
        max_size=5,
    ),
    metadata=st.dictionaries(names, st.text(st.characters(codec="utf-8")), max_size=3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_of_any_dtype_and_shape_survive_safetensors(tmp_path, tensors, metadata):
    values = np.random.default_rng(0).integers(0, 2, 81).astype(np.float32)
    saved = {
        name: Tensor.of(values[: int(np.prod(shape))].reshape(shape), dtype) for name, (dtype, shape) in tensors.items()
    }
    save_safetensors(tmp_path / "a", saved, metadata)
    opened = open_safetensors(tmp_path / "a")
    assert opened.keys() == saved.keys()
    for name, tensor in saved.items():
        assert opened[name].dtype == tensor.dtype
        np.testing.assert_array_equal(opened[name].data, tensor.data, strict=True)


if __name__ == "__main__":
    fuzz(sys.argv[1], Path(sys.argv[2]))
