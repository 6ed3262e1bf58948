"""What a packed layer holds: base-3 bytes in the native library's layout, multiplied from traced functions."""

from collections.abc import Mapping
from typing import Any

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


class PackedDense(NativeFunction):
    """y = float32(c_x c_W) (s_x s_W) + b, c_x, s_x of rms_norm(x) * gain, or of x itself without gain.

    Codes c_W [units, features] take 1.6 bits each. Compiled functions hold on to the object, so new weights are
    assigned to it. Without the native library it holds int8 codes: correct, and slow.
    """

    def __init__(self, layer: str) -> None:
        """Without weights so far; layer: its layer's name, for errors."""
        super().__init__()
        self.layer = layer
        self.matrix: PackedMatrix | None = None
        self.scale = np.float32(0)
        self.bias: np.ndarray | None = None
        self.gain: np.ndarray | None = None

    def assign(self, codes: np.ndarray, scale: Any, bias: np.ndarray | None, gain: np.ndarray | None) -> None:
        """codes: int8 [units, features], each -1, 0 or 1; scale: one number; bias: [units]; gain: [features]."""
        self.matrix = PackedMatrix.from_codes(codes, "base3")
        self.scale = np.float32(scale)
        self.bias, self.gain = (None if a is None else np.array(a, np.float32) for a in (bias, gain))

    def latent(self) -> np.ndarray:
        """A float32 kernel [features, units] that quantises to these codes: w = c s / p, p the share of codes not zero.

        Then mean |w| = s, so the scale is s again where bfloat16 holds it, and the nearest that it holds otherwise.
        Raises ThriftyError where all codes are zero and s is not the least scale: no kernel has these.
        """
        codes = self.weights().codes()
        share = np.count_nonzero(codes) / codes.size
        if not share and self.scale > spec.round_bf16(spec.EPS):
            raise ThriftyError(
                f"[DenseMML] a kernel of zeros has the scale {spec.EPS}; '{self.layer}' has {self.scale}; run it packed"
            )
        return np.ascontiguousarray(codes.T) * np.float32(self.scale / max(share, 1 / codes.size))

    def store(self) -> dict[str, np.ndarray]:
        """What a file holds of it: `KEYS`, and `bias` and `gain` where they are."""
        codes = self.weights().codes()
        values = VERSION, codes.shape, self.scale, base3.encode(codes)
        kernel = dict(zip(KEYS, map(np.asarray, values), strict=True))
        return kernel | {name: a for name, a in (("bias", self.bias), ("gain", self.gain)) if a is not None}

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
        matrix = self.weights()
        rows = np.ascontiguousarray(x, np.float32).reshape(-1, matrix.cols)
        codes, scales = native.quantize_per_token(rows, self.gain, norm=self.gain is not None)
        return matrix.matmul(codes, scales, self.scale, self.bias).reshape(*x.shape[:-1], matrix.rows)

    def weights(self) -> PackedMatrix:
        """The codes. Raises ThriftyError before any are assigned."""
        if self.matrix is None:
            raise ThriftyError(
                f"[DenseMML] the packed layer '{self.layer}' has no weights; load them from a file, or build it with "
                "packed=False, train it, and pack() it"
            )
        return self.matrix
