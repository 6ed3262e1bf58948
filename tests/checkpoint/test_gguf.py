import os
import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thrifty import ThriftyError, spec
from thrifty.checkpoint import TensorToWrite, open_gguf, save_gguf

NUMBERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.uint64, np.int64, np.float64]

METADATA = {
    "general.architecture": "bitnet",
    "empty": "",
    "unicode": "Ġ日本 \n\0",
    **{f"number.{number.__name__}": number(7) for number in NUMBERS},
    **{f"array.{number.__name__}": np.arange(5, dtype=number) for number in NUMBERS},
    "least": np.int64(-(2**63)),
    "most": np.uint64(2**64 - 1),
    "yes": True,
    "no": False,
    "bools": np.array([True, False, True]),
    "strings": ["a", "", "Ġb"],
    "no strings": [],
    "no numbers": np.empty(0, np.int32),
    "nested": (np.arange(3, dtype=np.uint8), ["x"], (np.ones(2, np.float64), [])),
    "no arrays": (),
}


def tensors(seed=0):
    """Name to kind, shape and bytes, one of each kind."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (5, 256)).astype(np.int8)
    floats = rng.normal(size=(3, 7)).astype(np.float32)
    made = {
        "norm": ("F32", (7,), floats[0]),
        "half": ("F16", (3, 7), floats.astype(np.float16)),
        "brain": ("BF16", (3, 7), spec.round_bf16(floats).view(np.uint16)[:, 1::2]),
        "deep": ("F32", (2, 1, 3, 2), floats.reshape(-1)[:12]),
        "eight": ("Q8_0", (4, 64), spec.quantize_q8_0(rng.normal(size=(4, 64)).astype(np.float32))),
        "scalar": ("F32", (), floats[0, :1]),
        "nothing": ("F32", (0, 4), floats[:0]),
    }
    for kind in spec.GGUF_TERNARY:
        made[kind] = (kind, codes.shape, spec.gguf_encode(kind, codes, 0.5))
    return {
        name: (kind, shape, np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        for name, (kind, shape, data) in made.items()
    }


def save(path, metadata, made):
    save_gguf(
        path,
        metadata,
        [TensorToWrite(name, kind, shape, lambda d=data: d) for name, (kind, shape, data) in made.items()],
    )


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, strict=True)
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("alignment", [None, 1, 8, 4096])
def test_what_is_saved_is_read_and_saved_again_to_the_same_bytes(tmp_path, alignment):
    metadata = METADATA if alignment is None else {**METADATA, "general.alignment": np.uint32(alignment)}
    made = tensors()
    save(tmp_path / "a", metadata, made)
    file = open_gguf(tmp_path / "a")
    assert file.path == tmp_path / "a"
    assert list(file.metadata) == list(metadata)
    for key in metadata:
        same(file.metadata[key], metadata[key])
    assert list(file.tensors) == list(made)
    for name, (kind, shape, data) in made.items():
        block = file.tensors[name]
        assert (block.kind, block.shape) == (kind, shape)
        np.testing.assert_array_equal(block.data, data, strict=True)
        assert not block.data.flags.writeable or not block.data.size
    again = {name: (block.kind, block.shape, block.data) for name, block in file.tensors.items()}
    save(tmp_path / "b", file.metadata, again)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert (tmp_path / "a").stat().st_size % (alignment or 32) == 0


def test_the_gguf_package_reads_what_is_saved(tmp_path):
    made = {name: entry for name, entry in tensors().items() if name not in ("I2_S", "nothing", "scalar")}
    metadata = {
        k: v for k, v in METADATA.items() if k not in ("nested", "no arrays", "no strings", "no numbers", "bools")
    }
    save(tmp_path / "a", metadata, made)
    reader = gguf.GGUFReader(tmp_path / "a")
    for key, value in metadata.items():
        np.testing.assert_array_equal(reader.fields[key].contents(), value)
    assert [tensor.name for tensor in reader.tensors] == list(made)
    for tensor in reader.tensors:
        kind, shape, data = made[tensor.name]
        assert tensor.tensor_type.name == kind
        assert tuple(tensor.shape)[::-1] == shape
        np.testing.assert_array_equal(tensor.data.reshape(-1).view(np.uint8), data)


def test_what_the_gguf_package_saves_is_read(tmp_path):
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(tmp_path / "a", "llama")
    writer.add_uint32("some.count", 3)
    writer.add_float32("some.eps", 1e-5)
    writer.add_bool("some.flag", True)
    writer.add_array("some.texts", ["a", "Ġb"])
    writer.add_array("some.numbers", [1, 2, 3])
    floats = rng.normal(size=(4, 512)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    for kind in (kinds.F32, kinds.F16, kinds.BF16, kinds.Q8_0, kinds.TQ1_0, kinds.TQ2_0):
        writer.add_tensor(kind.name, gguf.quants.quantize(floats, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a")
    expected = {
        "general.architecture": "llama",
        "some.count": np.uint32(3),
        "some.eps": np.float32(1e-5),
        "some.flag": True,
        "some.texts": ["a", "Ġb"],
        "some.numbers": np.array([1, 2, 3], np.int32),
    }
    assert file.metadata.keys() == expected.keys()
    for key, value in expected.items():
        same(file.metadata[key], value)
    assert list(file.tensors) == ["F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0"]
    for kind, block in file.tensors.items():
        assert block.kind == kind
        assert block.shape == (4, 512)
        np.testing.assert_array_equal(block.data, gguf.quants.quantize(floats, kinds[kind]).reshape(-1).view(np.uint8))


numbers = st.sampled_from(NUMBERS)
texts = st.text(st.characters(codec="utf-8"), max_size=5)
arrays = st.one_of(
    numbers.flatmap(
        lambda n: st.binary(max_size=40).map(lambda b: np.frombuffer(b[: len(b) // n().itemsize * n().itemsize], n))
    ),
    st.lists(st.booleans(), max_size=4).map(lambda flags: np.array(flags, bool)),
    st.lists(texts, max_size=4),
)
values = st.one_of(
    st.booleans(),
    texts,
    numbers.flatmap(
        lambda n: st.binary(min_size=n().itemsize, max_size=n().itemsize).map(lambda b: np.frombuffer(b, n)[0])
    ),
    st.recursive(arrays, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4),
)


@given(metadata=st.dictionaries(texts.filter(bool), values, max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_metadata_of_any_type_survive(tmp_path, metadata):
    save_gguf(tmp_path / "a", metadata, [])
    file = open_gguf(tmp_path / "a")
    assert list(file.metadata) == list(metadata)
    save_gguf(tmp_path / "b", file.metadata, [])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for key, value in metadata.items():
        assert type(file.metadata[key]) is type(value)


def test_version_2_is_read(tmp_path):
    save(tmp_path / "a", METADATA, tensors())
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:4] + struct.pack("<I", 2) + whole[8:])
    assert len(open_gguf(tmp_path / "a").tensors) == len(tensors())


def test_tensors_may_lie_in_another_order_than_they_are_listed(tmp_path):
    body = np.arange(16, dtype=np.float32).tobytes()
    path = tmp_path / "a"
    path.write_bytes(raw(infos=[info("x", offset=32, shape=(8,)), info("y", offset=0, shape=(8,))], body=body))
    file = open_gguf(path)
    assert list(file.tensors) == ["x", "y"]
    np.testing.assert_array_equal(file.tensors["x"].data.view(np.float32), np.arange(8, 16))


def test_few_tensors_are_made_before_they_are_written(tmp_path):
    path, ahead = tmp_path / "a", []

    def make(i):
        written = next(iter(tmp_path.glob(".a.*"))).stat().st_size
        ahead.append(i - written // 2**20)
        return np.zeros(2**18, np.float32)

    save_gguf(path, {}, [TensorToWrite(f"t{i}", "F32", (2**18,), lambda i=i: make(i)) for i in range(12)])
    assert max(ahead) <= 4


def test_what_fails_on_the_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    save(path, {}, tensors())
    before = path.read_bytes()

    def fails():
        raise RuntimeError("on purpose")

    good = TensorToWrite("good", "F32", (4,), lambda: np.zeros(4, np.float32))
    with pytest.raises(RuntimeError, match="on purpose"):
        save_gguf(path, {}, [good, TensorToWrite("bad", "F32", (4,), fails)])
    with pytest.raises(ThriftyError, match="'short' must have 16 bytes; got 12"):
        save_gguf(path, {}, [good, TensorToWrite("short", "F32", (4,), lambda: np.zeros(3, np.float32))])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (("x" * 64, "F32", (4,)), "name of at most 63 bytes"),
        (("x", "F32", (1, 1, 1, 1, 4)), "at most 4 axes"),
        (("x", "Q4_0", (32,)), "type among"),
        (("x", "TQ2_0", (4, 128)), "multiple of 256 columns; tensor 'x'"),
        (("x", "Q8_0", ()), "multiple of 32 columns; tensor 'x'"),
    ],
)
def test_tensors_that_no_file_holds_are_refused(tmp_path, tensor, reason):
    name, kind, shape = tensor
    with pytest.raises(ThriftyError, match=reason):
        save_gguf(tmp_path / "a", {}, [TensorToWrite(name, kind, shape, lambda: np.zeros(4, np.float32))])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", [3, 0.5, None, [1], [["a"]], np.zeros((2, 2)), np.float16(1), b"x", (3,), {"a": 1}])
def test_values_whose_type_the_file_could_not_tell_are_refused(tmp_path, value):
    with pytest.raises(TypeError, match="'key' is"):
        save_gguf(tmp_path / "a", {"key": value}, [])


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def info(name="x", shape=(4,), kind=0, offset=0, n_dims=None) -> bytes:
    n = len(shape)
    return text(name) + struct.pack(f"<I{n}QIQ", n if n_dims is None else n_dims, *shape[::-1], kind, offset)


def raw(values=(), infos=(), body=b"", magic=b"GGUF", version=3, counts=None) -> bytes:
    n_tensors, n_values = counts or (len(infos), len(values))
    header = magic + struct.pack("<IQQ", version, n_tensors, n_values) + b"".join(values) + b"".join(infos)
    return header + bytes(-len(header) % 32) + body


def array(kind, count, body=b"") -> bytes:
    return text("k") + struct.pack("<IIQ", 9, kind, count) + body


NESTED = text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5 + struct.pack("<IQ", 4, 0)
FOUR = bytes(16)

BAD = {
    "no bytes": (b"", "readable and not empty"),
    "short": (b"GG", "begins with 'GGUF'"),
    "a web page": (b"<!DOCTYPE html>", "no web page"),
    "magic alone": (b"GGUF", "announces 4 bytes"),
    "no counts": (b"GGUF\3\0\0\0\1", "announces 16 bytes"),
    "version 1": (raw(version=1), "is version 1; convert the model again"),
    "version 4": (raw(version=4), "is version 4"),
    "big-endian": (raw(version=3 << 24), "is a big-endian file"),
    "values that are not there": (raw(counts=(0, 2**60)), "announces 1152921504606846976 metadata"),
    "tensors that are not there": (raw(counts=(2**63, 0)), "announces 9223372036854775808 tensors"),
    "a key that is not there": (raw(counts=(0, 2), values=[text("k") + b"\0\0\0\0\1" + bytes(18)]), "a key is empty"),
    "a key past the end": (raw([struct.pack("<Q", 2**64 - 1) + bytes(16)]), "a string ends behind the file"),
    "a key twice": (raw([text("k") + struct.pack("<I?", 7, 1)] * 2), "key 'k' occurs twice"),
    "a key of no characters": (raw([text(b"\xff\xfe") + struct.pack("<I?", 7, 1)]), "is not UTF-8"),
    "a text of no characters": (raw([text("k") + struct.pack("<I", 8) + text(b"\xc3\x28")]), "is not UTF-8"),
    "a type of no value": (raw([text("k") + struct.pack("<IQ", 13, 0)]), "have types 0 to 12, and one has 13"),
    "a bool of 2": (raw([text("k") + struct.pack("<IB", 7, 2)]), "neither 0 nor 1"),
    "bools of 3": (raw([array(7, 2, b"\1\3")]), "neither 0 nor 1"),
    "numbers past the end": (raw([array(10, 2**61, bytes(8))]), "announces 2305843009213693952 numbers"),
    "texts past the end": (raw([array(8, 2**40, bytes(8))]), "announces 1099511627776 strings"),
    "arrays past the end": (raw([array(9, 2**40, bytes(8))]), "announces 1099511627776 arrays"),
    "an array of no type": (raw([array(77, 1, bytes(8))]), "one has 77"),
    "arrays in arrays": (raw([NESTED]), "more than 4 deep"),
    "an alignment of 3": (raw([text("general.alignment") + struct.pack("<II", 4, 3)]), "power of two"),
    "an alignment of 0": (raw([text("general.alignment") + struct.pack("<II", 4, 0)]), "power of two"),
    "a vast alignment": (raw([text("general.alignment") + struct.pack("<II", 4, 2**31)]), "power of two"),
    "a text for alignment": (raw([text("general.alignment") + struct.pack("<I", 8) + text("32")]), "power of two"),
    "a tensor twice": (raw(infos=[info(), info(offset=32)], body=bytes(48)), "tensor 'x' occurs twice"),
    "five axes": (raw(infos=[info(shape=(1,) * 5)], body=FOUR), "has 5 axes"),
    "axes that are not there": (raw(infos=[info(n_dims=2**32 - 1)], body=FOUR), "has 4294967295 axes"),
    "a size that overflows": (raw(infos=[info(shape=(2**32, 2**32))], body=FOUR), "absurd shape"),
    "a size of 0 that overflows": (raw(infos=[info(shape=(2**63, 0))], body=FOUR), "absurd shape"),
    "a vast size": (raw(infos=[info(shape=(2**40,))], body=FOUR), "bytes too early"),
    "a tensor past the end": (raw(infos=[info(offset=32)], body=FOUR), "the file ends 32 bytes too early"),
    "a tensor far away": (raw(infos=[info(offset=2**64 - 32)], body=FOUR), "bytes too early"),
    "a tensor between multiples": (raw(infos=[info(offset=4)], body=bytes(32)), "no multiple of 32"),
    "overlapping tensors": (
        raw(infos=[info("x", (16,)), info("y", offset=32)], body=bytes(64)),
        "another begins within",
    ),
    "tensors in one place": (raw(infos=[info("x"), info("y")], body=FOUR), "another begins within"),
    "half a block": (raw(infos=[info(kind=8, shape=(2, 48))], body=bytes(102)), "must be a multiple of 32 columns"),
    "a block of one weight": (raw(infos=[info(kind=34, shape=())], body=bytes(54)), "multiple of 256 columns"),
    "Q4_K": (raw(infos=[info(kind=12)], body=FOUR), r"tensor 'x' of .* has type 12 \(Q4_K\)"),
    "I8_S": (raw(infos=[info(kind=37)], body=FOUR), r"type 37 \(I8_S of Microsoft's fork"),
    "TL1": (raw(infos=[info(kind=38)], body=FOUR), r"type 38 \(TL1 of Microsoft's fork"),
    "TL2": (raw(infos=[info(kind=39)], body=FOUR), r"type 39 \(TL2 of Microsoft's fork, or MXFP4"),
    "a type of the future": (raw(infos=[info(kind=999)], body=FOUR), "type 999, which is unknown"),
    "IQ4_NL_4_4": (raw(infos=[info(kind=36, shape=(2, 256))], body=bytes(288)), "type 36 is I2_S in Microsoft's fork"),
    "I2_S cut short": (raw(infos=[info(kind=36, shape=(2, 256))], body=bytes(150)), "the file ends 10 bytes too early"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused_by_name(tmp_path, case):
    data, reason = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ThriftyError, match=r"\[gguf\] [\s\S]*bad\.gguf") as caught:
        open_gguf(path)
    caught.match(reason)
    assert str(caught.value).count(";") >= 2


def test_absent_file_and_folder(tmp_path):
    with pytest.raises(ThriftyError, match=r"none\.gguf does not; check the path"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(ThriftyError, match="must be readable"):
        open_gguf(tmp_path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a"
    save(path, {"a": "text", "b": np.arange(3), "c": ["x", "y"]}, {"x": tensors()["TQ2_0"], "y": tensors()["norm"]})
    whole = path.read_bytes()
    needed = len(whole) - 4  # the last tensor has 28 bytes, and padding
    assert open_gguf(path).tensors["y"].data.size == 28
    for size in range(needed):
        path.write_bytes(whole[:size])
        with pytest.raises(ThriftyError):
            open_gguf(path)
    path.write_bytes(whole[:needed])
    open_gguf(path)
