"""Every layer by its name; the modules are named as in the seeds, so that their import lines work."""

from thrifty.keras.layers.activations import GLUMML, BilinearMML, GeGLUMML, ReGLUMML, SeGLUMML, SwiGLUMML
from thrifty.keras.layers.cached_attention import CachedMultiHeadAttention
from thrifty.keras.layers.core import DenseMML, RMSNorm
from thrifty.keras.layers.dynamic_mask_attention import DynamicMaskAttention
from thrifty.keras.layers.embedding import PatchEmbedding, Patches, RotaryPositionalEmbedding, TokenEmbedding
from thrifty.keras.layers.product_key_experts import CrossDomainMoE
from thrifty.keras.layers.recurrent import GRUMML, LRUMML, GRUCellMML, LRUCellMML
from thrifty.keras.layers.reshaping import Divide, Merge
from thrifty.keras.layers.transformer import AttentionMML, FeedForwardGate, TransformerBlockMML

__all__ = [
    "GLUMML",
    "GRUMML",
    "LRUMML",
    "AttentionMML",
    "BilinearMML",
    "CachedMultiHeadAttention",
    "CrossDomainMoE",
    "DenseMML",
    "Divide",
    "DynamicMaskAttention",
    "FeedForwardGate",
    "GRUCellMML",
    "GeGLUMML",
    "LRUCellMML",
    "Merge",
    "PatchEmbedding",
    "Patches",
    "RMSNorm",
    "ReGLUMML",
    "RotaryPositionalEmbedding",
    "SeGLUMML",
    "SwiGLUMML",
    "TokenEmbedding",
    "TransformerBlockMML",
]
