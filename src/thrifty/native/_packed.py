"""Weight matrices in the kernels' layouts."""

import numpy as np

from thrifty import spec
from thrifty.errors import ThriftyError
from thrifty.native._library import FORMAT_IDS, aligned_empty, check_cols, load
from thrifty.native._threads import default_threads

#: Ternary formats that kernels multiply, and those of output heads.
KERNEL_FORMATS = ("i2", "base3")
MATRIX_FORMATS = (*KERNEL_FORMATS, "i8", "i4")


def pack(fmt: str, codes: np.ndarray, n_threads: int | None = None) -> np.ndarray:
    """Bytes of weight codes int8 [rows, cols], as `thrifty.spec.pack`: uint8 of the format's packed shape.

    fmt: 'i2', 'base3' or 'row_block' natively, any format of the spec through numpy. Raises ThriftyError where a code
    is not in the format, or the columns are too many for its products.
    """
    record, library, codes = _format(fmt), load(), _codes("pack", fmt, codes)
    if library is None or fmt not in FORMAT_IDS:
        return spec.pack(record, codes)
    packed = aligned_empty(record.nbytes(*codes.shape)).reshape(record.packed_shape(*codes.shape))
    pack_into(fmt, codes, packed, n_threads)
    return packed


def pack_into(fmt: str, codes: np.ndarray, packed: np.ndarray, n_threads: int | None = None) -> None:
    """`pack` into a contiguous uint8 array of the packed size."""
    record, library, codes = _format(fmt), load(), _codes("pack", fmt, codes)
    if library is None or fmt not in FORMAT_IDS:
        packed[...] = spec.pack(record, codes)
        return
    if packed.nbytes != record.nbytes(*codes.shape) or not packed.flags.c_contiguous:
        raise ThriftyError(
            f"[pack] {codes.shape[0]} x {codes.shape[1]} weights in '{fmt}' take {record.nbytes(*codes.shape)}"
            f" contiguous bytes; got {packed.nbytes}"
        )
    threads = default_threads() if n_threads is None else n_threads
    status = library.pack(FORMAT_IDS[fmt], *codes.shape, codes.ctypes.data, packed.ctypes.data, threads)
    library.check("pack", status)


def unpack(fmt: str, packed: np.ndarray, rows: int, cols: int, n_threads: int | None = None) -> np.ndarray:
    """Weight codes int8 [rows, cols] of bytes made by `pack`, as `thrifty.spec.unpack`.

    Raises ThriftyError where the byte count does not fit the shape, a digit stands for no code, or the columns are too
    many for the format's products.
    """
    record = _format(fmt)
    check_cols("unpack", fmt, cols)
    library = load()
    if library is None or fmt not in FORMAT_IDS or packed.size != record.nbytes(rows, cols):
        return spec.unpack(record, packed, rows, cols)
    packed = np.ascontiguousarray(packed, np.uint8)
    codes = aligned_empty(rows * cols).view(np.int8).reshape(rows, cols)
    threads = default_threads() if n_threads is None else n_threads
    status = library.unpack(FORMAT_IDS[fmt], rows, cols, packed.ctypes.data, codes.ctypes.data, threads)
    library.check("unpack", status)
    return codes


class PackedMatrix:
    """A ternary matrix [rows, cols] in a kernel layout, which owns its aligned memory.

    Made by `from_codes`; pickled and copied through its codes. Without the native library it holds int8
    codes and multiplies through numpy: correct, and slow.
    """

    __slots__ = ("_address", "_format_id", "_held", "_library", "cols", "format", "nbytes", "rows", "width")

    #: Rows and columns of the matrix.
    rows: int
    cols: int
    #: Name of the layout, 'i2' or 'base3'.
    format: str
    #: Bytes of memory that a product reads: of the layout, padding included, or of the codes.
    nbytes: int
    #: Columns with padding: least stride of x given by address, zero and readable up to here.
    width: int

    def __init__(self, packed: np.ndarray, rows: int, cols: int, fmt: str):
        """Takes bytes that `pack` made, uint8 of the format's packed size, contiguous, without copying them."""
        if fmt not in MATRIX_FORMATS:
            raise ThriftyError(f"[ternary_matmul] format must be one of {', '.join(MATRIX_FORMATS)}; got '{fmt}'")
        check_cols("ternary_matmul", fmt, cols)
        record = spec.FORMATS[fmt]
        size = record.nbytes(rows, cols)
        if packed.dtype != np.uint8 or packed.size != size or not packed.flags.c_contiguous:
            raise ThriftyError(
                f"[ternary_matmul] {rows} x {cols} weights in '{fmt}' take {size} contiguous bytes;"
                f" got {packed.dtype} {packed.shape}"
            )
        self.format, self.rows, self.cols = fmt, rows, cols
        self.width = record.padded(rows, cols)[1]
        self._format_id = FORMAT_IDS[fmt]
        self._library = load()
        # Bytes of the layout, or int8 codes where there is no library to read it.
        self._held = spec.unpack(record, packed, rows, cols) if self._library is None else packed
        self._address = self._held.ctypes.data
        self.nbytes = self._held.nbytes

    @classmethod
    def from_codes(cls, codes: np.ndarray, fmt: str = "i2") -> "PackedMatrix":
        """Packs codes int8 [rows, cols], each -1, 0 or 1. Raises ThriftyError for others."""
        if fmt not in MATRIX_FORMATS:
            raise ThriftyError(f"[ternary_matmul] format must be one of {', '.join(MATRIX_FORMATS)}; got '{fmt}'")
        packed = pack(fmt, codes)
        rows, cols = codes.shape
        return cls(packed, rows, cols, fmt)

    def codes(self) -> np.ndarray:
        """The codes again: int8 [rows, cols]."""
        if self._library is None:
            return self._held.copy()
        return unpack(self.format, self._held, self.rows, self.cols)

    def __reduce__(self):
        return PackedMatrix.from_codes, (self.codes(), self.format)

    def __repr__(self) -> str:
        return f"PackedMatrix({self.rows} x {self.cols}, {self.format}, {self.nbytes} bytes)"

    def matmul(
        self,
        x_codes: np.ndarray,
        x_scales: np.ndarray,
        w_scale: float | np.ndarray,
        bias: np.ndarray | None = None,
        n_threads: int | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """y = float32(x_codes . w^T) * (x_scale * w_scale) + bias, as `thrifty.spec.ternary_matmul` bit for bit.

        x_codes: int8 [n, cols], or [n, stride] with stride >= `width` and zeros from cols on, which spares a copy where
        cols is no multiple of the format's block; x_scales: float32 [n]; w_scale: a number or float32 [rows]; bias:
        float32 [rows] or None; out: float32 [n, rows]. All contiguous. Raises ThriftyError otherwise.
        """
        n, stride = self._check_x(x_codes, x_scales)
        scales = w_scale if isinstance(w_scale, np.ndarray) else np.asarray(w_scale, np.float32)
        if scales.dtype != np.float32 or scales.size not in (1, self.rows) or not scales.flags.c_contiguous:
            raise ThriftyError(
                f"[ternary_matmul] w_scale must be a number or contiguous float32 ({self.rows},);"
                f" got {scales.dtype} {scales.shape}"
            )
        if bias is not None:
            _check_floats("bias", bias, (self.rows,))
        if out is None:
            out = np.empty((n, self.rows), np.float32)
        else:
            _check_floats("out", out, (n, self.rows))
        if self._library is None:
            out[...] = self._multiply_codes(x_codes, x_scales, scales, bias)
            return out
        x = x_codes
        if stride < self.width:
            x, stride = np.zeros((n, self.width), np.int8), self.width
            x[:, : self.cols] = x_codes
        self.matmul_into(
            *(x.ctypes.data, stride, x_scales.ctypes.data, n, scales.ctypes.data, scales.size),
            *(None if bias is None else bias.ctypes.data, out.ctypes.data, n_threads),
        )
        return out

    def matmul_into(
        self,
        x: int,
        x_stride: int,
        x_scales: int,
        n: int,
        w_scale: int,
        n_w_scales: int,
        bias: int | None,
        y: int,
        n_threads: int | None = None,
    ) -> None:
        """`matmul` between addresses (`array.ctypes.data`, `tensor.data_ptr()`), nothing checked but sizes.

        x: int8 [n, x_stride], x_stride >= `width`, zero from cols to `width`. Needs the native library.
        """
        if self._library is None:
            raise ThriftyError(
                "[ternary_matmul] addresses need the native library; install with a compiler, or pass arrays"
            )
        threads = default_threads() if n_threads is None else n_threads
        status = self._library.ternary_matmul(
            *(self._format_id, self._address, self.rows, self.cols, w_scale, n_w_scales, bias),
            *(x, x_stride, x_scales, n, y, threads),
        )
        self._library.check("ternary_matmul", status)

    def _check_x(self, x_codes: np.ndarray, x_scales: np.ndarray) -> tuple[int, int]:
        if x_codes.ndim != 2 or x_codes.dtype != np.int8 or not x_codes.flags.c_contiguous:
            raise ThriftyError(
                f"[ternary_matmul] x_codes must be contiguous int8 [n, {self.cols}];"
                f" got {x_codes.dtype} {x_codes.shape}"
            )
        n, stride = x_codes.shape
        if stride != self.cols and stride < self.width:
            raise ThriftyError(
                f"[ternary_matmul] x_codes must have {self.cols} columns, or {self.width} and more with padding;"
                f" got {stride}"
            )
        _check_floats("x_scales", x_scales, (n,))
        return n, stride

    def _multiply_codes(self, x_codes, x_scales, scales, bias) -> np.ndarray:
        # float32 holds every partial sum of this many columns exactly, and numpy multiplies floats far faster.
        exact = 2**24 // (128 * max(spec.FORMATS[self.format].codes))
        x, w = x_codes[:, : self.cols], self._held
        if self.cols > exact:
            return spec.ternary_matmul(x, x_scales, w, scales, bias)
        y = (x.astype(np.float32) @ w.astype(np.float32).T) * (x_scales[:, None] * scales.reshape(1, -1))
        return y if bias is None else y + bias


def _format(name: str) -> spec.Format:
    if name not in spec.FORMATS:
        raise ThriftyError(f"[pack] format must be one of {', '.join(spec.FORMATS)}; got '{name}'")
    return spec.FORMATS[name]


def _codes(op: str, fmt: str, codes: np.ndarray) -> np.ndarray:
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.size == 0:
        raise ThriftyError(f"[{op}] codes must be int8 [rows, cols], neither 0; got {codes.dtype} {codes.shape}")
    check_cols(op, fmt, codes.shape[1])
    return np.ascontiguousarray(codes)


def _check_floats(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != np.float32 or not array.flags.c_contiguous:
        raise ThriftyError(
            f"[ternary_matmul] {name} must be contiguous float32 {shape}; got {array.dtype} {array.shape}"
        )
