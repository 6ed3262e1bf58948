try:
    from thrifty.native import PackedMatrix, default_threads, quantize_per_token, rms_norm
except ImportError:
    import numpy as np

    from thrifty import spec

    def default_threads():
        return 1

    def quantize_per_token(x, gain=None, eps=1e-5, norm=True, n_threads=None):
        return spec.quantize_per_token(x, gain, eps, norm)

    def rms_norm(x, gain=None, eps=1e-5):
        return spec.rms_norm(x, gain, eps)

    class PackedMatrix:
        def __init__(self, codes, fmt):
            self._codes, self.format = codes, spec.FORMATS[fmt]
            self.rows, self.cols = codes.shape
            self.nbytes = self.format.nbytes(self.rows, self.cols)

        @classmethod
        def from_codes(cls, codes, fmt="i2"):
            return cls(codes, fmt)

        def codes(self):
            return self._codes

        def matmul(self, x_codes, x_scales, w_scale, bias=None, n_threads=None, out=None):
            y = spec.ternary_matmul(x_codes, x_scales, self._codes, w_scale, bias)
            if out is None:
                return y
            np.copyto(out, y)
            return out


__all__ = ["PackedMatrix", "default_threads", "quantize_per_token", "rms_norm"]
