from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RopeScaling:
    """Frequencies of Llama 3.1: a model of `positions` positions made to read `factor` times as many.

    A frequency that turns less than `low` times in `positions` is divided by `factor`, one that turns more than `high`
    times stays, and those between are mixed (transformers' rope_type "llama3").
    """

    factor: float
    low: float
    high: float
    positions: int


def rope_frequencies(head_dim: int, theta: float = 10_000.0, scaling: RopeScaling | None = None) -> np.ndarray:
    """theta^(-2i / head_dim), i = 0 ... head_dim / 2 - 1: radians per position, float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponent
    if scaling is None:
        return frequencies
    turns = np.float32(scaling.positions) / (np.float32(2 * np.pi) / frequencies)
    kept = np.clip((turns - np.float32(scaling.low)) / np.float32(scaling.high - scaling.low), 0, 1)
    return (1 - kept) * (frequencies / np.float32(scaling.factor)) + kept * frequencies


def rope_tables(
    positions: np.ndarray, head_dim: int, theta: float = 10_000.0, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position * theta^(-2i / head_dim), i = 0 ... head_dim / 2 - 1 (RoFormer, arXiv 2104.09864).

    positions: int [T]. Returns two float32 [T, head_dim / 2]. Angles are float32 products, as transformers computes
    them; torch modules take their tables from here. scaling: of the frequencies.
    """
    angles = np.asarray(positions, np.float32)[:, None] * rope_frequencies(head_dim, theta, scaling)
    return np.cos(angles), np.sin(angles)


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the first and second half of the head ("rotate half").

    x: float32 [..., T, heads, head_dim]; cos, sin: [T, head_dim / 2].
    """
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
