"""Files as Keras-MML 0.1.1 writes them, by its description: one bit after the other, and slow."""

from collections import Counter

import numpy as np


def encode_ternary(codes: np.ndarray) -> np.ndarray:
    """The bytes of ternary codes: a header and a body of "0", "10" and "11", zeros up to a whole byte."""
    values = np.asarray(codes).reshape(-1).tolist()
    order = [value for value, _ in Counter(values).most_common()]  # ties: the first seen first
    order += [value for value in (0, 1, -1) if value not in order]
    bits = "".join({0: "0", 1: "10", -1: "11"}[value] for value in order[:2])
    bits += "".join(dict(zip(order, ("0", "10", "11"), strict=True))[value] for value in values)
    return np.packbits(np.frombuffer(bits.encode(), np.uint8) - ord("0"))
