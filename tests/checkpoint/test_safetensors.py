import json
import random
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from thrifty import ThriftyError
from thrifty.checkpoint import Tensor, open_safetensors, save_safetensors
from thrifty.spec import round_bf16


def test_what_is_saved_is_read_and_safetensors_agrees(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.safetensors"
    arrays = {
        "f32": rng.normal(size=(3, 5)).astype(np.float32),
        "f16": rng.normal(size=7).astype(np.float16),
        "u8": rng.integers(0, 256, (2, 3, 4)).astype(np.uint8),
        "i64": np.arange(3),
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_safetensors(path, {name: Tensor.of(array) for name, array in arrays.items()}, {"format": "pt"})
    for reader in (load_file(path), {name: tensor.data for name, tensor in open_safetensors(path).items()}):
        assert reader.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(reader[name], array, strict=True)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_bf16_rounds_to_even_and_widens_exactly(tmp_path):
    values = np.array([1, 1.00390625, 1.01171875, -3e38, 1e-40, 0, np.inf], np.float32)
    save_safetensors(tmp_path / "a", {"x": Tensor.of(values, "BF16")})
    (tensor,) = open_safetensors(tmp_path / "a").values()
    assert tensor.dtype == "BF16"
    np.testing.assert_array_equal(tensor.float32(), round_bf16(values), strict=True)


def test_torch_reads_bf16_the_same(tmp_path):
    torch_files = pytest.importorskip("safetensors.torch", exc_type=ImportError)
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    save_safetensors(tmp_path / "a", {"x": Tensor.of(values, "BF16")})
    np.testing.assert_array_equal(torch_files.load_file(tmp_path / "a")["x"].float().numpy(), round_bf16(values))


def test_tensors_are_views_and_cannot_be_written(tmp_path):
    save_safetensors(tmp_path / "a", {"x": Tensor.of(np.zeros(4, np.float32))})
    data = open_safetensors(tmp_path / "a")["x"].data
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_takes_no_anonymous_memory(tmp_path):
    save_safetensors(tmp_path / "a", {"x": Tensor.of(np.ones(8_000_000, np.float32))})
    code = """
    import sys
    from thrifty.checkpoint import open_safetensors
    anonymous = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
    before = anonymous()
    total = open_safetensors(sys.argv[1])["x"].data.sum()
    print(anonymous() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a")]
    assert int(subprocess.check_output(command)) < 4_000


def raw(header: bytes | object, body: bytes = bytes(16), size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD = {
    "empty": b"",
    "short": b"\1\2\3",
    "length only": struct.pack("<Q", 8),
    "absurd length": raw({}, size=2**60),
    "length past the end": raw({}, size=400),
    "length short of the header": raw({"x": entry()}, size=10),
    "no JSON": raw(b"{nonsense}"),
    "no UTF-8": raw(b"\xff\xfe\xfd"),
    "a list": raw([]),
    "deep": raw(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "duplicate": raw(b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2)),
    "overlap": raw({"x": entry(), "y": entry(shape=[2], offsets=[8, 16])}),
    "gap": raw({"x": entry(shape=[2], offsets=[0, 8]), "y": entry(shape=[1], offsets=[12, 16])}),
    "past the end": raw({"x": entry(offsets=[0, 16])}, body=bytes(8)),
    "data left over": raw({"x": entry()}, body=bytes(32)),
    "reversed": raw({"x": entry(offsets=[16, 0])}),
    "negative": raw({"x": entry(offsets=[-16, 0])}),
    "size differs": raw({"x": entry(shape=[3])}),
    "size overflows": raw({"x": entry(shape=[2**62, 8])}),
    "negative shape": raw({"x": entry(shape=[-4])}),
    "float shape": raw({"x": entry(shape=[4.0])}),
    "unknown dtype": raw({"x": entry("X32")}),
    "dtype numpy lacks": raw({"x": entry("F8_E4M3", [16])}),
    "no offsets": raw({"x": {"dtype": "F32", "shape": [4]}}),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "x": entry()}),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused_by_name(tmp_path, case):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(ThriftyError, match=r"\[safetensors\] .*bad\.safetensors"):
        open_safetensors(path)


def test_absent_file_and_folder(tmp_path):
    with pytest.raises(ThriftyError, match="does not"):
        open_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(ThriftyError, match="well formed"):
        open_safetensors(tmp_path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a"
    save_safetensors(path, {"x": Tensor.of(np.ones(5, np.float32)), "y": Tensor.of(np.ones(3, np.uint8))})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ThriftyError):
            open_safetensors(path)


def test_mutated_headers_never_crash(tmp_path):
    """Thousands of random edits: the file opens, with views inside it, or ThriftyError says why not."""
    rng = random.Random(0)
    path = tmp_path / "a"
    tensors = {
        f"layer.{i}": Tensor.of(np.ones((2, i + 1), np.float32), ["F32", "BF16", "F16"][i % 3]) for i in range(4)
    }
    save_safetensors(path, tensors, {"format": "pt"})
    whole = path.read_bytes()
    body = 8 + struct.unpack_from("<Q", whole)[0]
    opened = 0
    for _ in range(4000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(body)
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at] = rng.choice(b'0123456789-[]{}",:eE. ')
            elif kind == 2:
                del data[at : at + rng.randint(1, 8)]
            else:
                data[at:at] = data[at : at + rng.randint(1, 20)]
        path.write_bytes(data)
        try:
            for tensor in open_safetensors(path).values():
                assert tensor.data.nbytes <= len(data)
                tensor.float32()
            opened += 1
        except ThriftyError as error:
            reason = str(error)
            assert str(path) in reason
    assert opened < 2000
