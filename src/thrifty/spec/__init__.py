"""The definitions, in numpy, for a reader: what every kernel, module and runtime must compute.

Integer results of an implementation equal these bit for bit; floats lie within `thrifty.spec.TOLERANCES`.
"""

from thrifty.spec.attention import CHUNK, attention, attention_int8
from thrifty.spec.dynamic_mask import dynamic_mask_attention, kept_until, key_scores
from thrifty.spec.formats import BASE3, BASE3_ROW, BINARY, FORMATS, I2, I4, I8, ROW_BLOCK, Format, pack, unpack
from thrifty.spec.gguf_blocks import (
    GGUF_BLOCKS,
    GGUF_TERNARY,
    Q8_0,
    BlockFormat,
    dequantize_q8_0,
    gguf_block_scales,
    gguf_decode,
    gguf_encode,
    quantize_q8_0,
)
from thrifty.spec.glu import ACTIVATIONS, glu
from thrifty.spec.mlgru import gate_bounds, mlgru
from thrifty.spec.product_key_experts import product_key_experts, product_key_topk, staircase
from thrifty.spec.quantize_per_token import quantize_per_token, rms_norm
from thrifty.spec.quantizers import EPS, QMAX, absmean, binary_codes, round_bf16, ternary_codes
from thrifty.spec.rope import RopeScaling, apply_rope, rope_frequencies, rope_tables
from thrifty.spec.sampling import penalize_repetition, sample
from thrifty.spec.ssd import ssd
from thrifty.spec.ternary_matmul import ternary_matmul
from thrifty.spec.warm_linear import warm_linear

#: Largest difference from the spec allowed in floating-point results, relative to the largest magnitude of the
#: expected array, by dtype name; "int8" is attention over an 8-bit cache, where a weight at a tie may get either code.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2, "int8": 1e-4}

__all__ = [
    "ACTIVATIONS",
    "BASE3",
    "BASE3_ROW",
    "BINARY",
    "CHUNK",
    "EPS",
    "FORMATS",
    "GGUF_BLOCKS",
    "GGUF_TERNARY",
    "I2",
    "I4",
    "I8",
    "Q8_0",
    "QMAX",
    "ROW_BLOCK",
    "TOLERANCES",
    "BlockFormat",
    "Format",
    "RopeScaling",
    "absmean",
    "apply_rope",
    "attention",
    "attention_int8",
    "binary_codes",
    "dequantize_q8_0",
    "dynamic_mask_attention",
    "gate_bounds",
    "gguf_block_scales",
    "gguf_decode",
    "gguf_encode",
    "glu",
    "kept_until",
    "key_scores",
    "mlgru",
    "pack",
    "penalize_repetition",
    "product_key_experts",
    "product_key_topk",
    "quantize_per_token",
    "quantize_q8_0",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "round_bf16",
    "sample",
    "ssd",
    "staircase",
    "ternary_codes",
    "ternary_matmul",
    "unpack",
    "warm_linear",
]
