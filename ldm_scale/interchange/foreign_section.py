"""Values of a configuration that another program wrote, each of the type and in the range that ours takes.

One reader for all of them: theirs are JSON or YAML that anybody may have edited, so a value is what it says only after
it was looked at. An error names the file, the key, the value, the rule and the fix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ldm_scale.errors import CheckpointError, ConfigError

_ABSENT: Any = object()
MAX_SIZE, MAX_LAYERS = 2**20, 1000  # beyond any network: a number that no memory or patience could follow
_COUNTS_LAYERS = re.compile("layers|depth|num_res_blocks")
ChoiceT = TypeVar("ChoiceT")


class _Place(NamedTuple):
    """How the values of a file are spoken of."""

    what: str  # what the user corrects
    joint: str  # between a section's name and a key
    numbers_as_text: bool  # YAML reads 1e-4 as text


_YAML = _Place("the YAML", ".", True)
_FILE = _Place("the file", ": ", False)


class Section:
    """One mapping of a file; `name` is its path there."""

    def __init__(self, values: object, name: str, place: _Place = _YAML) -> None:
        self.place = place
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{name} is {values!r}, expected a section of keys and values; correct {place.what}")
        self.values, self.name = values, name

    @classmethod
    def of_json(cls, path: Path, values: object) -> Section:
        """The object in a JSON file."""
        return cls(values, str(path), _FILE)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands there."""
        return self.values.get(key, default)

    def section(self, key: str) -> Section:
        """A section within; absent or null is an empty one."""
        return Section(self.values.get(key) or {}, self._key(key), self.place._replace(joint="."))

    def integer(self, key: str, default: int = _ABSENT, *, at_least: int | None = None, at_most: int = MAX_SIZE) -> int:
        """A whole number.

        Raises: CheckpointError if it is missing without a default, no whole number, or outside of the bounds.
        """
        value = self._given(key, default)
        if not _is_whole(value, at_least, at_most):
            raise self._wrong(key, f"a whole number{_words(at_least=at_least, at_most=at_most)}")
        return value  # type: ignore[no-any-return]

    def number(
        self,
        key: str,
        default: float = _ABSENT,
        *,
        above: float | None = None,
        at_least: float | None = None,
        below: float | None = None,
    ) -> float:
        """A number, which is finite.

        Raises: CheckpointError if it is missing without a default, no number, or outside of the bounds.
        """
        value = self._given(key, default)
        try:
            is_text = isinstance(value, str) and self.place.numbers_as_text
            number = float(value) if is_text or type(value) in (int, float) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        fits = (above is None or number > above) and (at_least is None or number >= at_least)
        if not math.isfinite(number) or not fits or (below is not None and number >= below):
            raise self._wrong(key, f"a number{_words(above=above, at_least=at_least, below=below)}")
        return number

    def boolean(self, key: str, default: bool = _ABSENT) -> bool:
        """true or false.

        Raises: CheckpointError if it is missing without a default, or anything else.
        """
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def choice(
        self, key: str, choices: Mapping[str, ChoiceT], default: str = _ABSENT, *, who: str = "known are"
    ) -> ChoiceT:
        """What `choices` has for the text; `who` has them, in the message.

        Raises: CheckpointError if it is missing without a default, or not one of them: the model is another one.
        """
        value = self._given(key, default)
        if not isinstance(value, str) or value not in choices:
            raise CheckpointError(f"{self._key(key)}={_shown(value)}: {who} {', '.join(choices)}; not imported")
        return choices[value]

    def integers(
        self,
        key: str,
        default: tuple[int, ...] = _ABSENT,
        *,
        at_least: int | None = None,
        at_most: int = MAX_SIZE,
    ) -> tuple[int, ...]:
        """A list of whole numbers.

        Raises: CheckpointError if it is missing without a default, or anything else.
        """
        value = self._given(key, default)
        if not isinstance(value, list | tuple) or not all(_is_whole(item, at_least, at_most) for item in value):
            raise self._wrong(key, f"a list of whole numbers{_words(at_least=at_least, at_most=at_most)}")
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts.

        Raises: CheckpointError if it is missing, or anything else.
        """
        value = self._given(key, _ABSENT)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of texts")
        return tuple(value)

    def same(self, key: str, default: int = _ABSENT, *, at_least: int = 1, at_most: int = MAX_SIZE) -> int:
        """A whole number that may be given once for each level, as a list.

        Raises: CheckpointError if the levels differ.
        """
        value = self._given(key, default)
        if not isinstance(value, list | tuple):
            return self.integer(key, default, at_least=at_least, at_most=at_most)
        numbers = self.integers(key, at_least=at_least, at_most=at_most)
        if len(set(numbers)) != 1:
            raise CheckpointError(
                f"{self._key(key)}={list(value)}: our models have one number for all levels; not imported"
            )
        return numbers[0]

    def require(self, **expected: Any) -> None:
        """Nothing, if the keys are absent or have those values: our networks compute nothing else.

        Raises: CheckpointError that names the key.
        """
        for key, value in expected.items():
            found = self.values.get(key, value)
            if found != value and not (value is None and found in (False, -1)):
                raise CheckpointError(
                    f"{self._key(key)}={found!r}: our models have no such part, they compute what {value!r} says; "
                    "not imported"
                )

    def require_equal(self, who: str, **expected: Any) -> None:
        """As `require`, of values that `who` has, in the message.

        Raises: CheckpointError that names the key.
        """
        for key, value in expected.items():
            if self.values.get(key, value) != value:
                raise self.unheld(key, value, who)

    def unheld(self, key: str, value: object, who: str) -> CheckpointError:
        """The error of a key where `who` has that value."""
        return CheckpointError(f"{self._key(key)}={_shown(self.get(key))}: {who} {_shown(value)}; not imported")

    def require_known(self, *known: str) -> None:
        """Nothing, if there are no other keys: what a network's unknown key means nobody can tell.

        Raises: CheckpointError that names them.
        """
        unknown = sorted(str(key) for key in self.values.keys() - set(known))
        if unknown:
            raise CheckpointError(f"{self.name} has {', '.join(unknown)}: not a part that is known here; not imported")

    def require_possible(self) -> None:
        """Nothing, if no whole number here or in a section within is so large that what is built of it never ends.

        Raises: CheckpointError that names the key.
        """
        for key, value in self.values.items():
            if isinstance(value, Mapping):
                self.section(key).require_possible()
                continue
            for number in value if isinstance(value, list | tuple) else [value]:
                bound = MAX_LAYERS if _COUNTS_LAYERS.search(str(key)) else MAX_SIZE
                if type(number) is int and number > bound:
                    raise self._wrong(key, f"at most {bound}")

    def checked(self, check: Callable[[], object]) -> None:
        """Nothing, if `check` of the configuration of ours that was made of the section passes.

        Raises: CheckpointError that names the section.
        """
        try:
            check()
        except ConfigError as error:
            raise CheckpointError(f"{self.name} describes a model that cannot be built here: {error}") from error

    def _key(self, key: str) -> str:
        return f"{self.name}{self.place.joint}{key}"

    def _wrong(self, key: str, rule: str) -> CheckpointError:
        return CheckpointError(f"{self._key(key)}={_shown(self.get(key))}: must be {rule}; correct {self.place.what}")

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is _ABSENT:
            raise CheckpointError(
                f"{self._key(key)} is missing in {self.place.what}; give the one that belongs to the checkpoint"
            )
        return value


def _is_whole(value: object, at_least: int | None, at_most: int) -> bool:
    return type(value) is int and (at_least is None or value >= at_least) and value <= at_most


def _shown(value: object) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _words(**bounds: float | None) -> str:
    return "".join(f", {word.replace('_', ' ')} {bound:.9g}" for word, bound in bounds.items() if bound is not None)
