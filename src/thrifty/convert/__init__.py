"""Models from one form of files to another, without torch."""

from thrifty.convert.report import Conversion
from thrifty.convert.transformers import LINEAR_CLASSES, to_transformers

__all__ = ["LINEAR_CLASSES", "Conversion", "to_transformers"]
