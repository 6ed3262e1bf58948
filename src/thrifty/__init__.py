"""Train, convert and run language models that spend less.

Importing this package imports nothing heavy: torch, Keras and transformers are behind `thrifty.nn`, `thrifty.models`,
`thrifty.train` and `thrifty.keras`; `thrifty.runtime` needs none of them.
"""

from thrifty.errors import ThriftyError

__version__ = "0.1.0"
__all__ = ["ThriftyError", "__version__"]
