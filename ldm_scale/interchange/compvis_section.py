"""Values of a YAML of theirs, with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_scale.errors import CheckpointError

_ABSENT: Any = object()


class Section:
    """One mapping of the YAML; `name` is its path there."""

    def __init__(self, values: object, name: str) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{name} is {values!r}, expected a section of keys and values; correct the YAML")
        self.values, self.name = values, name

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands there."""
        return self.values.get(key, default)

    def section(self, key: str) -> Section:
        """A section within; absent or null is an empty one."""
        return Section(self.values.get(key) or {}, f"{self.name}.{key}")

    def integer(self, key: str, default: int = _ABSENT) -> int:
        """A whole number.

        Raises: CheckpointError if it is missing without a default, or no whole number.
        """
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.name}.{key}={value!r}: must be a whole number; correct the YAML")
        return value

    def number(self, key: str, default: float = _ABSENT) -> float:
        """A number; YAML reads one like 1e-4 as text.

        Raises: CheckpointError if it is missing without a default, or no number.
        """
        value = self._given(key, default)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.name}.{key}={value!r}: must be a number; correct the YAML") from error

    def integers(self, key: str, default: tuple[int, ...] = _ABSENT) -> tuple[int, ...]:
        """A list of whole numbers.

        Raises: CheckpointError if it is missing without a default, or anything else.
        """
        value = self._given(key, default)
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise CheckpointError(f"{self.name}.{key}={value!r}: must be a list of whole numbers; correct the YAML")
        return tuple(value)

    def same(self, key: str, default: int = _ABSENT) -> int:
        """A whole number that may be given once for each level, as a list.

        Raises: CheckpointError if the levels differ.
        """
        value = self._given(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            return Section({key: value[0]}, self.name).integer(key)
        if isinstance(value, list):
            raise CheckpointError(f"{self.name}.{key}={value}: our models have one number for all levels; not imported")
        return self.integer(key, default)

    def require(self, **expected: Any) -> None:
        """Nothing, if the keys are absent or have those values: our networks compute nothing else.

        Raises: CheckpointError that names the key.
        """
        for key, value in expected.items():
            found = self.values.get(key, value)
            if found != value and not (value is None and found in (False, -1)):
                raise CheckpointError(f"{self.name}.{key}={found!r}: our models have no such part; not imported")

    def require_known(self, *known: str) -> None:
        """Nothing, if there are no other keys: what a network's unknown key means nobody can tell.

        Raises: CheckpointError that names them.
        """
        unknown = sorted(str(key) for key in self.values.keys() - set(known))
        if unknown:
            raise CheckpointError(f"{self.name} has {', '.join(unknown)}: not a part that is known here; not imported")

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is _ABSENT:
            raise CheckpointError(
                f"{self.name}.{key} is missing in the YAML; give the one that belongs to the checkpoint"
            )
        return value
