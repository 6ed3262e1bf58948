import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from thrifty import native, spec
from thrifty.errors import ThriftyError
from thrifty.native import _library

needs_library = pytest.mark.skipif(not native.available(), reason="there is no native library")
UGLY = (1, 3, 63, 257, 500)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


@needs_library
@pytest.mark.parametrize("isa", sorted(set(native.built_isas()) & set(native.detected_isas())))
def test_the_environment_forces_an_instruction_set(isa):
    result = python("from thrifty import native; print(native.isa())", THRIFTY_ISA=isa)
    assert result.stdout.strip() == isa


@needs_library
def test_an_unknown_instruction_set_fails():
    result = python("from thrifty import native; native.isa()", THRIFTY_ISA="sse9")
    assert result.returncode != 0
    assert "must be one of generic, neon, avx2, avx512, avx512_vbmi, amx; got 'sse9'" in result.stderr
    assert "built: generic" in result.stderr
    assert "detected: generic" in result.stderr


@needs_library
def test_an_instruction_set_left_out_of_the_build_fails():
    missing = next(isa for isa in ("neon", "avx2") if isa not in native.built_isas())
    result = python("from thrifty import native; native.available()", THRIFTY_ISA=missing)
    assert "is not built into this library" in result.stderr


def test_an_instruction_set_the_processor_lacks_fails():
    names = [b"generic", b"avx2", None]
    library = SimpleNamespace(
        isa_name=lambda i: names[i], isa_built=lambda: 3, isa_detected=lambda: 1, isa_select=lambda name: 6
    )
    with pytest.raises(ThriftyError, match="is not detected on this processor; got 'avx2'; built: generic, avx2; det"):
        _library.select(library, "avx2")  # pyright: ignore[reportArgumentType]


def test_a_forced_library_that_is_missing_or_broken_fails(tmp_path: Path):
    code = "from thrifty import native; native.available()"
    assert "THRIFTY_LIBRARY must name a file" in python(code, THRIFTY_LIBRARY=str(tmp_path / "none.so")).stderr
    (tmp_path / "broken.so").write_bytes(b"\x7fELF nothing")
    assert "does not load" in python(code, THRIFTY_LIBRARY=str(tmp_path / "broken.so")).stderr


def test_without_a_library_numpy_answers_and_a_forced_path_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_library, "find", lambda: (None, "taken away"))
    _library.load.cache_clear()
    try:
        assert not native.available()
        assert native.info()["isa"] == "numpy"
        assert native.info()["built"] == ()
        assert native.aligned_empty(10).shape == (10,)
        with pytest.raises(ThriftyError, match="no native library to run 'avx2': taken away"):
            native.select_isa("avx2")
        with pytest.raises(ThriftyError, match="addresses need the native library"):
            native.quantize_into(0, None, 1e-5, True, 1, 1, 0, 1, 0)
    finally:
        monkeypatch.undo()
        _library.load.cache_clear()


def test_threads_come_from_the_environment():
    code = "from thrifty import native; print(native.default_threads())"
    assert python(code, THRIFTY_NUM_THREADS="3").stdout.strip() == "3"
    assert "THRIFTY_NUM_THREADS must be a whole number above 0; got '0'" in python(code, THRIFTY_NUM_THREADS="0").stderr
    assert 1 <= native.default_threads() <= max(native.cpu_threads(), int(os.environ.get("THRIFTY_NUM_THREADS", 1)))


REFUSED = """
import ctypes
from thrifty import native

class Stack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

small = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(small), 0, 4096)), None) == 0
print(*native.info()["detected"])
"""


@pytest.mark.skipif("amx" not in native.detected_isas(), reason="there are no tiles to refuse")
def test_refused_tiles_are_not_detected():
    # Linux refuses the state of tiles to a process with a signal stack on which it would not fit.
    detected = [isa for isa in native.detected_isas() if isa != "amx"]
    assert python(REFUSED).stdout.split() == detected
    result = python(REFUSED, THRIFTY_ISA="amx")
    assert "is not detected on this processor; got 'amx'" in result.stderr


@needs_library
def test_info_tells_what_runs():
    info = native.info()
    assert Path(info["library"]).is_file()
    assert info["isa"] in info["built"]
    assert info["isa"] in info["detected"]
    assert "generic" in info["built"]


@needs_library
@pytest.mark.parametrize("fmt", sorted(_library.FORMAT_IDS))
@pytest.mark.parametrize("rows", UGLY)
@pytest.mark.parametrize("cols", UGLY)
def test_pack_equals_the_spec(guarded, rng, fmt, rows, cols):
    record, library = spec.FORMATS[fmt], _library.load()
    assert library is not None
    codes = rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    assert library.pack_size(_library.FORMAT_IDS[fmt], rows, cols) == record.nbytes(rows, cols)
    packed, back = guarded(record.packed_shape(rows, cols), np.uint8), guarded((rows, cols), np.int8)
    library.pack(_library.FORMAT_IDS[fmt], rows, cols, codes.ctypes.data, packed.address, 2)
    library.unpack(_library.FORMAT_IDS[fmt], rows, cols, packed.address, back.address, 2)
    assert packed.intact()
    assert back.intact()
    np.testing.assert_array_equal(packed.array, spec.pack(record, codes))
    np.testing.assert_array_equal(back.array, codes)
    np.testing.assert_array_equal(native.pack(fmt, codes), packed.array)
    np.testing.assert_array_equal(native.unpack(fmt, packed.array, rows, cols), codes)


@pytest.mark.parametrize(
    ("fmt", "code"),
    [(fmt, code) for fmt in ("i2", "base3", "row_block") for code in (-128, -2, 2, 3, 127)]
    + [("i4", -8), ("i4", 8), ("i4", 127), ("i8", -128)],
)
def test_wrong_codes_are_refused_wherever_they_stand(fmt, code):
    for position in (0, 5, 29, 30 * 30 - 1):
        codes = np.zeros((30, 30), np.int8)
        codes.flat[position] = code
        with pytest.raises(ThriftyError, match=r"\[pack\]"):
            native.pack(fmt, codes)


def test_wrong_bytes_are_refused():
    with pytest.raises(ThriftyError, match=r"\[unpack\]"):
        native.unpack("i2", np.full(64, 0xFF, np.uint8), 16, 16)
    with pytest.raises(ThriftyError, match=r"\[unpack\]"):
        native.unpack("base3", np.full(64, 243, np.uint8), 16, 20)
    with pytest.raises(ThriftyError, match="take 64 bytes; got 63"):
        native.unpack("i2", np.zeros(63, np.uint8), 16, 16)
    with pytest.raises(ThriftyError, match="format must be one of"):
        native.pack("i3", np.zeros((1, 1), np.int8))


@needs_library
def test_memory_is_aligned_and_outlives_its_owner():
    for nbytes in (1, 1000, 3 << 20):
        memory = native.aligned_empty(nbytes)
        assert memory.ctypes.data % 64 == 0
        memory[...] = 7
        tail = memory[nbytes // 2 :]
        del memory
        gc.collect()
        assert (tail == 7).all()


@needs_library
def test_read_bandwidth_reads_with_every_loop():
    buffer = native.aligned_empty(1 << 20)
    buffer[...] = 1
    for loop in range(3):
        assert native.read_bandwidth(buffer, loop, 2) > 0
    with pytest.raises(ThriftyError, match=r"\[read_bandwidth\]"):
        native.read_bandwidth(buffer, 3, 1)


@needs_library
def test_int8_peak_of_every_instruction_set():
    peaks = {}
    for isa in native.detected_isas():
        native.select_isa(isa)
        peaks[isa] = max(native.int8_peak(1, 0.01) for _ in range(3))
        assert native.int8_peak(3, 1e-6) > 0
    native.select_isa(None)
    assert peaks["generic"] == min(peaks.values()) > 0
    with pytest.raises(ThriftyError, match=r"\[int8_peak\]"):
        native.int8_peak(1, 0.0)


#: Refuses arch_prctl(ARCH_REQ_XCOMP_PERM), by which a process asks Linux for the tiles of AMX, as a sandbox may.
REFUSE_TILES = """
import ctypes, struct
libc = ctypes.CDLL(None)
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]
load, equal, answer, arch_prctl, request, refuse, allow = 0x20, 0x15, 0x06, 158, 0x1023, 0x50001, 0x7FFF0000
lines = [(load, 0, 0, 0), (equal, 0, 3, arch_prctl), (load, 0, 0, 16), (equal, 0, 1, request), (answer, 0, 0, refuse)]
code = b"".join(struct.pack("HBBI", *line) for line in [*lines, (answer, 0, 0, allow)])
buffer = ctypes.create_string_buffer(code, len(code))
no_new_privileges, set_filter, by_program = 38, 22, 2
if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(
    set_filter, by_program, ctypes.byref(Program(len(code) // 8, ctypes.addressof(buffer))), 0, 0
):
    raise SystemExit("no filter")
"""


@pytest.mark.skipif("amx" not in native.detected_isas(), reason="this system grants no tiles to refuse")
def test_without_permission_for_tiles_the_products_are_the_same():
    code = """
import numpy as np
from thrifty import native
from thrifty.cli import main
rng = np.random.default_rng(0)
x, codes = rng.integers(-127, 128, (40, 320), np.int8), rng.integers(-1, 2, (96, 320), np.int8)
matrix = native.PackedMatrix.from_codes(codes, "base3")
y = matrix.matmul(np.pad(x, ((0, 0), (0, matrix.width - 320))), np.ones(40, np.float32), 1.0)
print(native.isa(), (y == x.astype(int) @ codes.T.astype(int)).all(), native.refused_isas())
main(["info"])
"""
    result = python(REFUSE_TILES + code)
    if result.stderr.strip() == "no filter":
        pytest.skip("the system takes no filter")
    first, *info = result.stdout.splitlines()
    assert first == f"{native.built_isas()[-2]} True ('amx',)"
    assert any(line.split() == ["refused", "by", "the", "system", "amx"] for line in info)
    assert native.refused_isas() == ()
