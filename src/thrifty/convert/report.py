"""What a conversion did."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

#: Told the name of a tensor once it is written.
Written = Callable[[str], None]


@dataclass
class Conversion:
    """What a conversion did."""

    output: Path
    #: Kinds of tensors before and after ("BF16 → Q8_0"), and their number and bytes written.
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, before: str, after: str, nbytes: int) -> None:
        """Count a tensor."""
        key = before if before == after else f"{before} → {after}"
        count, total = self.kinds.get(key, (0, 0))
        self.kinds[key] = (count + 1, total + nbytes)
