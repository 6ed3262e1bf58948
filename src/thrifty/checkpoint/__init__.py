"""Checkpoints as files: what the tensors of a model are called, and how they come in and go out. Speaks numpy."""

from thrifty.checkpoint.atomic import UnwritableError, atomic_file, atomic_files, atomic_folder, explained
from thrifty.checkpoint.config import DecoderConfig, read_config
from thrifty.checkpoint.folder import Folder, open_folder
from thrifty.checkpoint.names import SEED_NAMES, SEED_SSD_A, TensorInfo, expected_tensors
from thrifty.checkpoint.safetensors import Tensor, open_safetensors, save_safetensors

__all__ = [
    "SEED_NAMES",
    "SEED_SSD_A",
    "DecoderConfig",
    "Folder",
    "Tensor",
    "TensorInfo",
    "UnwritableError",
    "atomic_file",
    "atomic_files",
    "atomic_folder",
    "expected_tensors",
    "explained",
    "open_folder",
    "open_safetensors",
    "read_config",
    "save_safetensors",
]
