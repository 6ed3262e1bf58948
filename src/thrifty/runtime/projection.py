"""The products of a layer: quantised linears with the norm in front of them, and float matrices."""

import numpy as np

from thrifty.checkpoint import Tensor
from thrifty.runtime._native import PackedMatrix, quantize_per_token, rms_norm

#: Extra bytes that a float matrix may take to be kept as float32 instead of as stored.
WIDEN_LIMIT = 32 << 20
#: Rows of a 16-bit matrix that are widened at a time.
_BLOCK_BYTES = 4 << 20


class TernaryProjection:
    """y = ternary_matmul(quantize_per_token(x, gain), W) + b; several W with one input are stacked by rows."""

    def __init__(
        self,
        matrix: PackedMatrix,
        scale: np.ndarray,
        bias: np.ndarray | None,
        gain: np.ndarray | None,
        eps: float,
        n_threads: int,
    ) -> None:
        self.matrix = matrix
        self.rows = matrix.rows
        self.nbytes = matrix.nbytes
        self._scale = scale
        self._bias = bias
        self._gain = gain
        self._eps = eps
        self._n_threads = n_threads

    def __call__(self, x: np.ndarray, out: np.ndarray) -> None:
        """Write y [T, rows] for x float32 [T, cols]."""
        codes, scales = quantize_per_token(x, self._gain, self._eps, self._gain is not None, self._n_threads)
        self.matrix.matmul(codes, scales, self._scale, self._bias, self._n_threads, out)


class DenseProjection:
    """y = rms_norm(x, gain) W^T + b in float32."""

    def __init__(self, matrix: "FloatMatrix", bias: np.ndarray | None, gain: np.ndarray | None, eps: float) -> None:
        self.rows = matrix.rows
        self.nbytes = matrix.nbytes
        self._matrix = matrix
        self._bias = bias
        self._gain = gain
        self._eps = eps

    def __call__(self, x: np.ndarray, out: np.ndarray) -> None:
        """Write y [T, rows] for x float32 [T, cols]."""
        y = x if self._gain is None else rms_norm(x, self._gain, self._eps)
        self._matrix.matmul(y, out)
        if self._bias is not None:
            np.add(out, self._bias, out)


class FloatMatrix:
    """A float matrix [rows, cols]: float32 where that costs little memory, else 16 bits widened block by block.

    numpy has no product of bfloat16, and a second copy of a large embedding would break the promise that memory stays
    near the size of the weights.
    """

    def __init__(self, *tensors: Tensor, limit: int = WIDEN_LIMIT) -> None:
        count = sum(tensor.data.size for tensor in tensors)
        stored = sum(tensor.data.nbytes for tensor in tensors)
        wide = len(tensors) > 1 or tensors[0].dtype == "F64" or 4 * count - stored <= limit
        self.rows = sum(tensor.shape[0] for tensor in tensors)
        self._stored = tensors[0]
        self._wide = np.concatenate([tensor.float32() for tensor in tensors]) if wide else None
        self._block = max(1, _BLOCK_BYTES // (4 * tensors[0].shape[1]))
        self.nbytes = 4 * count if wide else stored

    def matmul(self, x: np.ndarray, out: np.ndarray) -> None:
        """Write x W^T [T, rows] for x float32 [T, cols]."""
        if self._wide is not None:
            np.matmul(x, self._wide.T, out)
            return
        for start in range(0, self.rows, self._block):
            rows = Tensor(self._stored.dtype, self._stored.data[start : start + self._block]).float32()
            out[:, start : start + self._block] = x @ rows.T
