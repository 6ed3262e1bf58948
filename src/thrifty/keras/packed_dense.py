"""What a packed layer holds: base-3 bytes in the native library's layout, multiplied from traced functions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from thrifty import native, spec
from thrifty.checkpoint import base3
from thrifty.errors import ThriftyError
from thrifty.keras.backend import NativeFunction
from thrifty.native import PackedMatrix

#: Version of what `PackedDense.store` gives.
VERSION = 1
#: Its names. Bytes (`thrifty.checkpoint.base3`) are of the codes [units, features], row after row.
KEYS = ("kernel_version", "kernel_shape", "kernel_scale", "kernel_packed")


class PackedWeights(NamedTuple):
    """Codes [units, features] at 1.6 bits each, the scale that multiplies them, bias [units] and gain [features]."""

    matrix: PackedMatrix
    scale: np.float32
    bias: np.ndarray | None
    gain: np.ndarray | None


class PackedDense(NativeFunction):
    """y = float32(c_x c_W) (s_x s_W) + b, c_x, s_x of rms_norm(x) * gain, or of x itself without gain.

    Compiled functions hold on to the object, and other threads may be calling it, so new weights are assigned to it
    all at once. Without the native library they are int8 codes: correct, and slow.
    """

    def __init__(self, layer: str) -> None:
        """Without weights so far; layer: its layer's name, for errors."""
        super().__init__()
        self.layer = layer
        self._weights: PackedWeights | None = None

    @property
    def weights(self) -> PackedWeights:
        """What it multiplies by. Raises ThriftyError before any weights are assigned."""
        if self._weights is None:
            raise ThriftyError(
                f"[DenseMML] the packed layer '{self.layer}' has no weights; load them from a file, or build it with "
                "packed=False, train it, and pack() it"
            )
        return self._weights

    def assign(self, codes: np.ndarray, scale: Any, bias: np.ndarray | None, gain: np.ndarray | None) -> None:
        """codes: int8 [units, features], each -1, 0 or 1; scale: one number; bias: [units]; gain: [features].

        Raises ThriftyError where the scale is not finite, as it is for a kernel with a NaN.
        """
        scale = np.float32(scale)
        if not np.isfinite(scale):
            raise ThriftyError(
                f"[DenseMML] a kernel must be finite to be packed; that of '{self.layer}' has the scale {scale}; go "
                "back to weights from before the loss became so"
            )
        bias, gain = (None if a is None else np.array(a, np.float32) for a in (bias, gain))
        self._weights = PackedWeights(PackedMatrix.from_codes(codes, "base3"), scale, bias, gain)

    def clear(self) -> None:
        """Let go of the weights. A function that was compiled for them raises when it is called."""
        self._weights = None

    def latent(self) -> np.ndarray:
        """A float32 kernel [features, units] that quantises to these codes: w = c s / p, p the share of codes not zero.

        Then mean |w| = s, so the scale is s again where bfloat16 holds it, and the nearest that it holds otherwise.
        Raises ThriftyError where all codes are zero and s is not the least scale: no kernel has these.
        """
        codes, scale = self.weights.matrix.codes(), self.weights.scale
        share = np.count_nonzero(codes) / codes.size
        if not share and scale > spec.round_bf16(spec.EPS):
            raise ThriftyError(
                f"[DenseMML] a kernel of zeros has the scale {spec.EPS}; '{self.layer}' has {scale}; run it packed"
            )
        return np.ascontiguousarray(codes.T) * np.float32(scale / max(share, 1 / codes.size))

    def store(self) -> dict[str, np.ndarray]:
        """What a file holds of it: `KEYS`, and `bias` and `gain` where they are."""
        held = self.weights
        codes = held.matrix.codes()
        values = VERSION, codes.shape, held.scale, base3.encode(codes)
        kernel = dict(zip(KEYS, map(np.asarray, values), strict=True))
        return kernel | {name: a for name, a in (("bias", held.bias), ("gain", held.gain)) if a is not None}

    def restore(self, store: Mapping[str, Any], shape: tuple[int, int]) -> None:
        """Assigns what `store` gave of [units, features]. Raises ThriftyError for another version or shape."""
        version, stored_shape, scale, packed = (np.asarray(store[key]) for key in KEYS)
        if int(version) != VERSION:
            raise ThriftyError(
                f"[DenseMML] a packed kernel must be of version {VERSION}; the file's '{self.layer}' is of version "
                f"{int(version)}; read it with the version of thrifty that wrote it, or a later one"
            )
        if tuple(stored_shape) != shape:
            raise ThriftyError(
                f"[DenseMML] '{self.layer}' has [units, features] = {shape}; the file's has "
                f"{tuple(stored_shape.tolist())}; build the layer as it was saved"
            )
        names = set(store.keys())
        bias, gain = (np.asarray(store[name]) if name in names else None for name in ("bias", "gain"))
        self.assign(base3.decode(packed, shape), scale, bias, gain)

    def on_array(self, x: Any) -> np.ndarray:
        """y of an array x [..., features]: float32 [..., units], the bits of `thrifty.spec.ternary_matmul`."""
        held = self.weights
        rows = np.ascontiguousarray(x, np.float32).reshape(-1, held.matrix.cols)
        codes, scales = native.quantize_per_token(rows, held.gain, norm=held.gain is not None)
        y = held.matrix.matmul(codes, scales, held.scale, held.bias)
        return y.reshape(*x.shape[:-1], held.matrix.rows)
