import numpy as np


def rope_frequencies(head_dim: int, theta: float = 10_000.0) -> np.ndarray:
    """theta^(-2i / head_dim), i = 0 ... head_dim / 2 - 1: radians per position, float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.float32(theta) ** exponent


def rope_tables(positions: np.ndarray, head_dim: int, theta: float = 10_000.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position * theta^(-2i / head_dim), i = 0 ... head_dim / 2 - 1 (RoFormer, arXiv 2104.09864).

    positions: int [T]. Returns two float32 [T, head_dim / 2]. Angles are float32 products, as transformers computes
    them; torch modules take their tables from here.
    """
    angles = np.asarray(positions, np.float32)[:, None] * rope_frequencies(head_dim, theta)
    return np.cos(angles), np.sin(angles)


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the first and second half of the head ("rotate half").

    x: float32 [..., T, heads, head_dim]; cos, sin: [T, head_dim / 2].
    """
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
