"""The products of a layer: low-bit linears with the norm in front of them, and float matrices."""

import numpy as np

from thrifty import native, spec
from thrifty.checkpoint import Folder, Tensor
from thrifty.checkpoint.names import EMBEDDING, HEAD, HEAD_NORM

#: Bytes by which a head of 16 or 8 bits may grow to be kept as float32.
WIDEN_LIMIT = 32 << 20
#: Bytes of a block of it otherwise.
_BLOCK_BYTES = 512 << 10


class TernaryProjection:
    """y = ternary_matmul(quantize_per_token(x, gain), W) + b; several W with one input are stacked by rows."""

    def __init__(
        self,
        matrix: native.PackedMatrix,
        scale: np.ndarray,
        bias: np.ndarray | None,
        gain: np.ndarray | None,
        eps: float,
    ) -> None:
        """scale: float32 [1] or [rows]; bias: float32 [rows] or None; gain: of the norm, None for no norm."""
        self.nbytes = matrix.nbytes
        self._matrix = matrix
        self._scale = scale
        self._bias = bias
        self._gain = gain
        self._eps = eps

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """y float32 [T, rows] for x float32 [T, cols]."""
        codes, scales = native.quantize_per_token(x, self._gain, self._eps, self._gain is not None)
        return self._matrix.matmul(codes, scales, self._scale, self._bias)


class DenseProjection:
    """y = rms_norm(x, gain) W^T + b in float32; several W with one input are stacked by rows."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None, gain: np.ndarray | None, eps: float) -> None:
        """weight: float32 [rows, cols]; bias and gain as for TernaryProjection."""
        self.nbytes = weight.nbytes
        self._weight = weight
        self._bias = bias
        self._gain = gain
        self._eps = eps

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """y float32 [T, rows] for x float32 [T, cols]."""
        y = (x if self._gain is None else native.rms_norm(x, self._gain, self._eps)) @ self._weight.T
        return y if self._bias is None else np.add(y, self._bias, y)


class Head:
    """logits = x W^T, W float32 where that costs little memory, else as stored and widened block by block.

    numpy has no product of bfloat16, and a float32 copy of a large embedding would break the promise that memory stays
    near the size of the weights. A block that stays in a core's cache while it is widened and multiplied costs hardly
    more time than reading a float32 copy would.
    """

    def __init__(
        self, weight: Tensor, n_threads: int = 1, limit: int = WIDEN_LIMIT, block_bytes: int = _BLOCK_BYTES
    ) -> None:
        """limit: bytes by which W may grow; block_bytes: of a widened block. Calls must not overlap."""
        self._n_threads = n_threads
        rows, cols = weight.shape
        grows = 4 * rows * cols - weight.data.nbytes
        self._stored = weight
        self._wide = weight.float32() if grows <= limit else None
        self._block = np.empty((min(rows, max(1, block_bytes // (4 * cols))), cols), np.float32)
        self.nbytes = weight.data.nbytes if self._wide is None else self._wide.nbytes

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [T, vocab] for x float32 [T, hidden]."""
        if self._wide is not None and len(x) == 1 and self._n_threads == 1:
            # numpy's matrix product takes threads of its own, as many as there are processors.
            return np.vecdot(self._wide, x[0])[None]
        if self._wide is not None:
            return x @ self._wide.T
        vocab = self._stored.shape[0]
        out = np.empty((len(x), vocab), np.float32)
        for start in range(0, vocab, len(self._block)):
            stop = min(start + len(self._block), vocab)
            rows = self._block[: stop - start]
            self._stored.widen(start, stop, rows)
            if len(x) == 1:
                np.vecdot(rows, x[0], out=out[0, start:stop])
            else:
                out[:, start:stop] = x @ rows.T
        return out


class QuantizedHead:
    """logits = quantize_per_token(x) W^T with W at 8 or 4 bits and a scale per row, as the native step has it."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        values, most = weight.float32(), {8: 127, 4: 7}[bits]
        largest = np.maximum(np.abs(values).max(-1), np.float32(spec.EPS))
        codes = np.rint(values * (np.float32(most) / largest)[:, None]).astype(np.int8)
        self._scale = largest / np.float32(most)
        self._matrix = native.PackedMatrix.from_codes(codes, f"i{bits}")
        self.nbytes = self._matrix.nbytes

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [T, vocab] for x float32 [T, hidden]."""
        return self._matrix.matmul(*native.quantize_per_token(x, norm=False), self._scale)


def make_head(folder: Folder, bits: int | None) -> Head | QuantizedHead | TernaryProjection:
    """The output head as stored, at 8 or 4 bits, or of ternary weights."""
    config = folder.config
    if config.ternary_head and config.linear_norm_eps is not None:
        codes, scale = folder.codes("lm_head", config.vocab_size)
        matrix, gain = native.PackedMatrix.from_codes(codes, "i2"), folder.float32(HEAD_NORM)
        return TernaryProjection(matrix, np.array([scale]), None, gain, config.linear_norm_eps)
    weight = folder.tensors[EMBEDDING if config.tie_word_embeddings else HEAD]
    return Head(weight) if bits is None else QuantizedHead(weight, bits)
