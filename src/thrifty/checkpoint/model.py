"""A model wherever it is: a folder, a GGUF file, or a name on the hub."""

from pathlib import Path

from thrifty.checkpoint.folder import Folder, open_folder
from thrifty.checkpoint.gguf_model import open_gguf_model


def open_model(path: str | Path) -> Folder:
    """A checkpoint from a folder or a .gguf file; tensors stay in mapped pages.

    Raises ThriftyError where it is absent, malformed, or holds other tensors than its config calls for.
    """
    path = Path(path)
    return open_gguf_model(path) if path.suffix == ".gguf" else open_folder(path)
