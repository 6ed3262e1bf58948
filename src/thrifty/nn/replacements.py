"""The record of a walk over a model's layers, and its table."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from torch import Tensor, nn

from thrifty import spec

#: Columns of the table as text.
_WIDTH = 120
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Layer:
    """One layer: its dotted name, its shape [out, in], bytes as it was and packed, and how, or why not."""

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_packed: int
    note: str

    @classmethod
    def of(cls, name: str, module: Any, note: str, packed_as: spec.Format | None = None) -> "Layer":
        """packed_as: the format of what replaces the layer; None where it stays."""
        weights = sorted(module.parameters(recurse=False), key=lambda p: -p.ndim)
        shape = tuple(weights[0].shape) if weights else ()
        if hasattr(module, "in_features"):
            shape = (module.out_features, module.in_features)  # pyright: ignore
        before = sum(map(nbytes, module.parameters(recurse=False)))
        after = before
        if packed_as is not None:
            # The scale is a bfloat16 number.
            bias = module.bias
            after = packed_as.nbytes(*shape) + 2 + (nbytes(bias) if isinstance(bias, Tensor) else 0)
        return cls(name, shape, before, after, note)


@dataclass(frozen=True, repr=False)
class Replacements:
    """What a walk replaced and what it left, and bytes: of the model as it was, and packed. Its text is a table.

    Parameters that are in no layer listed (embeddings, norms) are in `rest_bytes`; tied ones count once before.
    """

    title: str
    replaced: tuple[Layer, ...]
    skipped: tuple[Layer, ...]
    rest_bytes: int
    bytes_before: int
    bytes_packed: int

    @classmethod
    def of(cls, model: nn.Module, title: str, replaced: Sequence[Layer], skipped: Sequence[Layer]) -> "Replacements":
        """The record of a model whose layers still have their parameters."""
        modules = dict(model.named_modules())
        inside = {id(p): nbytes(p) for entry in replaced for p in modules[entry.name].parameters(recurse=False)}
        left = {id(p): nbytes(p) for entry in skipped for p in modules[entry.name].parameters(recurse=False)}
        every = {id(p): nbytes(p) for p in model.parameters()}
        kept = sum(size for key, size in every.items() if key not in inside)
        rest = sum(size for key, size in every.items() if key not in inside and key not in left)
        packed = kept + sum(layer.bytes_packed for layer in replaced)
        return cls(title, tuple(replaced), tuple(skipped), rest, sum(every.values()), packed)

    def __repr__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=_WIDTH).print(self)
        return text.getvalue().rstrip()

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{self.title}: {len(self.replaced)} layers replaced, {len(self.skipped)} left")
        table.add_column("layers", overflow="fold")
        for heading in ("number", "shape", "MB", "MB packed"):
            table.add_column(heading, justify="right")
        table.add_column("how, or why not")
        for layers in (self.replaced, self.skipped):
            for group in grouped(layers):
                table.add_row(*_row(group))
            table.add_section()
        table.add_row("embeddings, norms and the rest", "", "", *[_megabytes(self.rest_bytes)] * 2, "left")
        table.add_section()
        table.add_row("all", "", "", _megabytes(self.bytes_before), _megabytes(self.bytes_packed), self._ratio())
        return table

    def _ratio(self) -> str:
        return f"{self.bytes_before / self.bytes_packed:.1f} times smaller" if self.bytes_packed else ""


def grouped(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Layers of one kind together: alike but for the numbers in their names."""
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        groups.setdefault((_NUMBER.sub("", layer.name), layer.shape, layer.note), []).append(layer)
    return list(groups.values())


def pattern(names: Sequence[str]) -> str:
    """What names have in common, with the numbers in which they differ as `{0-11}`."""
    numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    ranges = [_range(sorted(set(column))) for column in zip(*numbers, strict=True)]
    found = iter(ranges)
    return _NUMBER.sub(lambda _: next(found), names[0])


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, of all of its shards where it is sharded."""
    return tensor.numel() * tensor.element_size()


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers[-1] - numbers[0] + 1 == len(numbers)
    return "{" + (f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))) + "}"


def _row(group: list[Layer]) -> tuple[str, ...]:
    before, packed = sum(entry.bytes_before for entry in group), sum(entry.bytes_packed for entry in group)
    name = pattern([entry.name for entry in group]) or "the model"
    shape = " x ".join(map(str, group[0].shape))
    return name, str(len(group)), shape, _megabytes(before), _megabytes(packed), group[0].note


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}" if size < 1e8 else f"{size / 1e6:.1f}"
