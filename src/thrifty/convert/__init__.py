"""Models from one form of files to another, without torch."""

from thrifty.convert.gguf import HEAD_TYPES, WEIGHT_TYPES, to_gguf
from thrifty.convert.report import Conversion
from thrifty.convert.transformers import LINEAR_CLASSES, to_transformers

__all__ = ["HEAD_TYPES", "LINEAR_CLASSES", "WEIGHT_TYPES", "Conversion", "to_gguf", "to_transformers"]
