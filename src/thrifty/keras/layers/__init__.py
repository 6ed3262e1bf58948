"""Every layer by its name; the modules are named as in the seeds, so that their import lines work."""

from thrifty.keras.layers.cached_attention import CachedMultiHeadAttention
from thrifty.keras.layers.core import DenseMML, RMSNorm
from thrifty.keras.layers.embedding import RotaryPositionalEmbedding
from thrifty.keras.layers.reshaping import Divide, Merge
from thrifty.keras.layers.transformer import FeedForwardGate

__all__ = [
    "CachedMultiHeadAttention",
    "DenseMML",
    "Divide",
    "FeedForwardGate",
    "Merge",
    "RMSNorm",
    "RotaryPositionalEmbedding",
]
