"""A model wherever it is: a folder, a GGUF file, or a name on the hub."""

from pathlib import Path

from thrifty.checkpoint.folder import Folder, open_folder
from thrifty.checkpoint.gguf_model import Decode, open_gguf_model
from thrifty.checkpoint.hub import resolve
from thrifty.spec import gguf_decode


def open_model(path: str | Path, decode: Decode = gguf_decode) -> Folder:
    """A checkpoint from a folder, a .gguf file, or the hub (`resolve` says which ids); tensors stay in mapped pages.

    decode: what reads low-bit blocks of a GGUF file, where there is something faster than the definition.
    Raises ThriftyError where it is absent, malformed, or holds other tensors than its config calls for.
    """
    path = resolve(path)
    return open_gguf_model(path, decode) if path.suffix == ".gguf" else open_folder(path)
