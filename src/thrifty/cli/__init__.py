"""The command `thrifty`: text → train → pack → run."""

from thrifty.cli.app import main

__all__ = ["main"]
