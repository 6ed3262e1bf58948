"""Every layer by its name; the modules are named as in the seeds, so that their import lines work."""

from thrifty.keras.layers.core import DenseMML, RMSNorm

__all__ = ["DenseMML", "RMSNorm"]
