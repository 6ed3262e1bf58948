"""Operations on torch tensors: validate, choose an implementation, call.

Every op has the name it has in `thrifty.spec`, which says what it computes.
"""

from thrifty.ops.attention import attention
from thrifty.ops.bit_linear import KINDS, Kind, bit_linear, quantize_weight
from thrifty.ops.dynamic_mask_attention import dynamic_mask_attention, kept_until, key_scores
from thrifty.ops.glu import ACTIVATIONS, activation, glu
from thrifty.ops.mlgru import mlgru
from thrifty.ops.packed_linear import packed_linear, packed_product
from thrifty.ops.product_key_experts import product_key_experts, product_key_topk
from thrifty.ops.quantize_per_token import quantize_per_token, rms_norm
from thrifty.ops.rope import apply_rope
from thrifty.ops.ssd import ssd
from thrifty.ops.ternary_matmul import pack_weight, ternary_matmul, unpack_weight
from thrifty.ops.warm_linear import warm_linear

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "Kind",
    "activation",
    "apply_rope",
    "attention",
    "bit_linear",
    "dynamic_mask_attention",
    "glu",
    "kept_until",
    "key_scores",
    "mlgru",
    "pack_weight",
    "packed_linear",
    "packed_product",
    "product_key_experts",
    "product_key_topk",
    "quantize_per_token",
    "quantize_weight",
    "rms_norm",
    "ssd",
    "ternary_matmul",
    "unpack_weight",
    "warm_linear",
]
