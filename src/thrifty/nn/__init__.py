"""Torch modules: low-bit layers and the blocks made of them. They own state; the arithmetic is in `thrifty.ops`."""

from thrifty.nn.attention import BitAttention
from thrifty.nn.cache import DynamicMaskLayer, RecurrentLayer
from thrifty.nn.dynamic_mask_attention import SELECTIONS, DMAttn, DynamicMaskAttention, kept_keys
from thrifty.nn.experts import PEER, CDMoE, ExpertUsage, load_balance_loss
from thrifty.nn.feedforward import BitFeedForward
from thrifty.nn.linear import LINEARS, BitLinear, make_linear
from thrifty.nn.mlgru import MLGRU
from thrifty.nn.native_kernels import NativeBitLinear, use_native_kernels
from thrifty.nn.norm import RMSNorm
from thrifty.nn.packing import PackedBitLinear, is_packed, pack, unpack
from thrifty.nn.replacements import Replacements
from thrifty.nn.rotary import RotaryEmbedding
from thrifty.nn.ssd import SSD
from thrifty.nn.ternarize import replace_linears_in_hf, ternarize

__all__ = [
    "LINEARS",
    "MLGRU",
    "PEER",
    "SELECTIONS",
    "SSD",
    "BitAttention",
    "BitFeedForward",
    "BitLinear",
    "CDMoE",
    "DMAttn",
    "DynamicMaskAttention",
    "DynamicMaskLayer",
    "ExpertUsage",
    "NativeBitLinear",
    "PackedBitLinear",
    "RMSNorm",
    "RecurrentLayer",
    "Replacements",
    "RotaryEmbedding",
    "is_packed",
    "kept_keys",
    "load_balance_loss",
    "make_linear",
    "pack",
    "replace_linears_in_hf",
    "ternarize",
    "unpack",
    "use_native_kernels",
]
