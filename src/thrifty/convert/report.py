"""What a conversion did, and must not do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from thrifty import native
from thrifty.checkpoint.folder import Folder
from thrifty.checkpoint.model import open_model
from thrifty.errors import ThriftyError

#: Told the name of a tensor once it is written.
Written = Callable[[str], None]


@dataclass
class Conversion:
    """What a conversion did."""

    output: Path
    #: Kinds of tensors before and after ("BF16 → Q8_0"), and their number and bytes written.
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: What is not to be seen from these.
    notes: list[str] = field(default_factory=list)

    def add(self, before: str, after: str, nbytes: int) -> None:
        """Count a tensor."""
        key = before if before == after else f"{before} → {after}"
        count, total = self.kinds.get(key, (0, 0))
        self.kinds[key] = (count + 1, total + nbytes)


def refuse_onto_itself(source: Folder, output: Path) -> None:
    """Raises ThriftyError where a conversion would replace what it reads."""
    read, made = source.path.resolve(), output.resolve()
    if made == read or made in read.parents:
        raise ThriftyError(f"[convert] the output must not be the source or hold it; got {output} for {source.path}")


def opened(source: Folder | str | Path) -> Folder:
    """A model that is open already, or a path or hub id."""
    return source if isinstance(source, Folder) else open_model(source, native.gguf_decode)
