"""Documents packed side by side in a row, none of which may see another."""

from itertools import pairwise

import torch
from torch import Tensor


def opening(documents: Tensor) -> Tensor:
    """Whether a token is the first of its document; the first of a row goes on from what came before it.

    documents: int [B, T], equal within a document, another number in the next. Returns bool [B, T].
    """
    return torch.diff(documents, prepend=documents[:, :1]) != 0


def visible(documents: Tensor) -> Tensor:
    """Which keys a query sees: those of its own document up to itself. Returns bool [B, 1, T, T]."""
    return (documents[:, :, None] == documents[:, None]).tril()[:, None]


def pieces(documents: Tensor | None, rows: int) -> list[tuple[int, slice]]:
    """Row and tokens of every document, in order; whole rows where there is None."""
    if documents is None:
        return [(row, slice(None)) for row in range(rows)]
    found = []
    for row, first in enumerate(opening(documents).cpu()):
        edges = [0, *first.nonzero().flatten().tolist(), len(first)]
        found += [(row, slice(begin, end)) for begin, end in pairwise(edges)]
    return found
