"""The classes that the samples of tars name, gathered tar by tar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ldm_scale.data.metadata import read_class, read_metadata
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import RawSample
from ldm_scale.errors import DataError

_MAX_CLASSES = 1_000_000  # a larger number is an identifier, not a class
_MAX_NAME = 256  # characters; a longer text is no name of a class


class Classes:
    """The classes that occur: numbers, or names in alphabetical order, never both."""

    def __init__(self, known: Sequence[str] = ()) -> None:
        numeric = bool(known) and list(known) == [str(number) for number in range(len(known))]
        self._names = set() if numeric else set(known)
        self._count = len(known) if numeric else 0

    def visit(self, shard: str, sample: str, texts: Mapping[str, bytes]) -> None:
        """Nothing; takes in the class of a sample from its .cls and .json.

        Raises: DataError if some classes are numbers and some are names.
        """
        raw: RawSample = dict(texts)
        try:
            found = read_class(raw, read_metadata(raw) if "cls" not in raw else {})
        except BadSample:
            return  # counted and named where it is read for training
        if isinstance(found, str) and len(found) <= _MAX_NAME:
            self._names.add(found)
        elif isinstance(found, int):
            self._count = max(self._count, found + 1)
        if max(self._count, len(self._names)) > _MAX_CLASSES:
            raise DataError(
                f"{shard}: sample {sample} has class {found}; class numbers are below {_MAX_CLASSES}, and names are "
                "not more"
            )
        if self._names and self._count:
            other = "number" if isinstance(found, str) else "name"
            raise DataError(f"{shard}: sample {sample} has class {found!r}, others have a {other}; use one kind")

    def merge(self, shard: str, names: Sequence[str]) -> None:
        """Nothing; takes in the list of a shard.

        Raises: DataError if it has numbers where others have names, or the reverse.
        """
        other = Classes(names)
        self._names |= other._names
        self._count = max(self._count, other._count)
        if self._names and self._count:
            kinds = ("names", "numbers") if other._names else ("numbers", "names")
            raise DataError(f"{shard}: its classes are {kinds[0]}, those of other shards are {kinds[1]}; use one kind")

    def names(self) -> list[str]:
        """The manifest's list of classes."""
        return sorted(self._names) if self._names else [str(number) for number in range(self._count)]
