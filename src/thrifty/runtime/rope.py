"""Rotary tables that grow with the positions in use."""

import numpy as np

from thrifty.spec import RopeScaling, rope_tables

#: Positions computed at a time.
BLOCK = 4096


class RopeTables:
    """`cos` and `sin` float32 [positions, head_dim / 2], whose rows are `spec.rope_tables` as far as `reach` went.

    Memory is taken as it is written: a model of many positions costs address space only.
    """

    def __init__(self, positions: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
        shape = (positions, head_dim // 2)
        self.cos, self.sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._how = head_dim, theta, scaling
        self._ready = 0

    def reach(self, count: int) -> None:
        """Make the first `count` rows valid."""
        while self._ready < count:
            stop = min(self._ready + BLOCK, len(self.cos))
            part = slice(self._ready, stop)
            self.cos[part], self.sin[part] = rope_tables(np.arange(self._ready, stop), *self._how)
            self._ready = stop
