"""Tensors by name that are read when they are asked for, anew each time.

What holds a model's weights as a plain dictionary holds all of them for as long as it lives, and a conversion has
several such holders: source, translation, what is read back. Here only who asks for a tensor keeps it, so that a model
passes through memory a tensor at a time. It costs a read for each pass over the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor


class Deferred(NamedTuple):
    """A tensor that can be read."""

    like: Tensor  # of its shape and type, on the meta device
    read: Callable[[], Tensor]


class LazyTensors(Mapping[str, Tensor]):
    """A dictionary of tensors that keeps none of them. What is changed in place in one that it gave is lost."""

    def __init__(self, entries: Mapping[str, Deferred]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    def __or__(self, other: Mapping[str, Tensor]) -> LazyTensors:
        return LazyTensors(self._entries | deferred(other))

    @property
    def entries(self) -> Mapping[str, Deferred]:
        """The tensors, unread."""
        return self._entries


def deferred(tensors: Mapping[str, Tensor]) -> dict[str, Deferred]:
    """Any dictionary's tensors, unread."""
    if isinstance(tensors, LazyTensors):
        return dict(tensors.entries)
    return {name: Deferred(x.detach().to("meta"), partial(_same, x)) for name, x in tensors.items()}


def without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same names, shapes and types, without memory behind them."""
    return {name: entry.like for name, entry in deferred(tensors).items()}


def num_elements(tensors: Mapping[str, Tensor]) -> int:
    """Elements of all tensors together."""
    return sum(tensor.numel() for tensor in without_values(tensors).values())


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in without_values(tensors).values())


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> LazyTensors:
    """The tensors under the names that `rename` gives; without those for which it gives None."""
    named = ((rename(name), entry) for name, entry in deferred(tensors).items())
    return LazyTensors({name: entry for name, entry in named if name is not None})


def converted(tensors: Mapping[str, Tensor], convert: Callable[[Tensor], Tensor]) -> LazyTensors:
    """What `convert` makes of each tensor, when it is read."""

    def later(entry: Deferred) -> Deferred:
        return Deferred(convert(entry.like), lambda: convert(entry.read()))

    return LazyTensors({name: later(entry) for name, entry in deferred(tensors).items()})


def parts_of(
    tensors: Mapping[str, Tensor], named: Mapping[str, Sequence[str]], split: Callable[[str, Tensor], Iterable[Tensor]]
) -> LazyTensors:
    """The parts into which `split(name, tensor)` divides each tensor, under `named[name]`.

    The tensor that was read last is kept until another one is: asked for in this order, each is read once.
    """
    last: dict[str, list[Tensor]] = {}

    def part(entry: Deferred, name: str, index: int) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = list(split(name, entry.read()))
        return last[name][index]

    found: dict[str, Deferred] = {}
    for name, entry in deferred(tensors).items():
        for index, (part_name, like) in enumerate(zip(named[name], split(name, entry.like), strict=True)):
            assert part_name not in found, f"{part_name} is filled twice"
            found[part_name] = Deferred(like, partial(part, entry, name, index))
    return LazyTensors(found)


def joined(
    tensors: Mapping[str, Tensor],
    named: Mapping[str, Sequence[str]],
    join: Callable[[str, list[Tensor]], Tensor],
) -> LazyTensors:
    """What `join(name, parts)` makes of the tensors `named[name]`: the inverse of `parts_of`."""
    entries = deferred(tensors)

    def whole(name: str) -> Deferred:
        parts = [entries[part] for part in named[name]]
        return Deferred(join(name, [part.like for part in parts]), lambda: join(name, [part.read() for part in parts]))

    return LazyTensors({name: whole(name) for name in named})


def _same(tensor: Tensor) -> Tensor:
    return tensor
