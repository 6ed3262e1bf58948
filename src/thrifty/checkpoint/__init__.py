"""Checkpoints as files: what the tensors of a model are called, and how they come in and go out. Speaks numpy."""

from thrifty.checkpoint.atomic import UnwritableError, atomic_file, atomic_files, atomic_folder, explained
from thrifty.checkpoint.config import DecoderConfig, read_config
from thrifty.checkpoint.folder import Folder, open_folder
from thrifty.checkpoint.gguf import GGUF, Block, TensorToWrite, open_gguf, save_gguf
from thrifty.checkpoint.model import open_model
from thrifty.checkpoint.names import SEED_NAMES, SEED_SSD_A, TensorInfo, expected_tensors
from thrifty.checkpoint.safetensors import Tensor, open_safetensors, save_safetensors

__all__ = [
    "GGUF",
    "SEED_NAMES",
    "SEED_SSD_A",
    "Block",
    "DecoderConfig",
    "Folder",
    "Tensor",
    "TensorInfo",
    "TensorToWrite",
    "UnwritableError",
    "atomic_file",
    "atomic_files",
    "atomic_folder",
    "expected_tensors",
    "explained",
    "open_folder",
    "open_gguf",
    "open_model",
    "open_safetensors",
    "read_config",
    "save_gguf",
    "save_safetensors",
]
