"""Strict conversion between the typed configuration and plain dictionaries, as checkpoints and artifacts store them.

Written by hand rather than by a schema library: the type hints of `schema.py` are the only schema, and an error is
one line that names the key, the value, the rule and the fix. Missing keys take their defaults, so a file that an
older version wrote still opens; unknown keys and wrong types are refused, so a typo never passes. This module sees
the standard library, `errors` and `redaction` alone, because artifacts and checkpoints (far below Hydra) need it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ldm_scale.config.schema import Config
from ldm_scale.errors import ConfigError
from ldm_scale.redaction import public_urls

T = TypeVar("T")
PlainDict = dict[str, Any]  # what json and yaml can hold


def config_to_dict(config: object) -> PlainDict:
    """The configuration (or one of its sections) as plain dictionaries, lists and scalars, ready for JSON.

    It is stored and shown, so its URLs are without users, passwords and queries.
    """
    assert dataclasses.is_dataclass(config), f"not a section: {config!r}"
    return {f.name: _to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def flat_config(config: object) -> dict[str, Any]:
    """As `config_to_dict`, without sections in one another: scalars, lists and None by their dotted keys."""
    return dict(_flat(config_to_dict(config), ""))


def _flat(values: PlainDict, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def config_from_dict(data: Mapping[str, object]) -> Config:
    """The configuration that `config_to_dict` had written, or that Hydra has composed.

    Raises: ConfigError on an unknown key, a wrong type or a value outside a closed set of choices.
    """
    return section_from_dict(Config, data)


def section_from_dict(section: type[T], data: Mapping[str, object], key: str = "") -> T:
    """One section (any dataclass of the schema) from a dictionary; `key` is its dotted place, for the messages.

    Raises: as `config_from_dict`.
    """
    hints = field_types(section)
    for name in data:
        if name not in hints:
            raise unknown_key_error(_join(key, str(name)), data[name], section)
    values = {name: _convert(data[name], hint, _join(key, name)) for name, hint in hints.items() if name in data}
    return section(**values)


def field_types(section: type) -> dict[str, Any]:
    """Field name -> resolved type of a section of the schema."""
    hints = get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


def key_type(key: str) -> Any | None:
    """The type that the schema gives to a dotted key, or None where there is no such key."""
    current: Any = Config
    for name in key.split("."):
        current = _section_type(current)
        if current is None:
            return None
        current = field_types(current).get(name)
    return current


def unknown_key_error(key: str, value: object, section: type | None = None) -> ConfigError:
    """An error that names the unknown key and the nearest known ones; `section` is where it was looked for."""
    parent, _, leaf = key.rpartition(".")
    place = parent or "the top level"
    if leaf == "_target_":
        return ConfigError(
            f"{key}={value!r}: config values never name code to run; remove it and set the named options of {place}"
        )
    known = list(_all_keys(Config, ""))
    near = [k for k in known if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(key, known, n=2, cutoff=0.75)
    if near:
        return ConfigError(f"{key}={value!r}: there is no such key; did you mean {' or '.join(near[:3])}?")
    owner = section or _section_type(key_type(parent))
    if owner is None:
        owner, place = Config, "the top level"
    return ConfigError(f"{key}={value!r}: there is no such key; {place} has {', '.join(field_types(owner))}")


def _all_keys(section: type, prefix: str) -> Iterator[str]:
    for name, hint in field_types(section).items():
        key = _join(prefix, name)
        yield key
        inner = _section_type(hint)
        if inner is not None:
            yield from _all_keys(inner, key)


def _section_type(hint: Any) -> type | None:
    """The dataclass behind a hint, which may be absent (`Section | None`); None if the hint is no section."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next((member for member in get_args(hint) if dataclasses.is_dataclass(member)), None)
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _to_plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return public_urls(value) if isinstance(value, str) else value


def _convert(value: object, hint: Any, key: str) -> Any:
    """`value` as the type `hint`, or a ConfigError: nothing is coerced except int -> float and list -> tuple."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{key}={value!r}: interpolations are refused, because config values neither read the environment nor "
            "run resolvers; write the value itself"
        )
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r}: {key} is a section; set its keys one by one, such as {_example(key)}")
        return section_from_dict(hint, value, key)  # type: ignore[arg-type]
    if origin is Literal:
        return _convert_choice(value, get_args(hint), key)
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        assert len(members) == 1, f"{key}: the schema may use unions with None only, got {hint}"
        return None if value is None else _convert(value, members[0], key)
    if origin is tuple:
        return _convert_tuple(value, get_args(hint), key)
    return _convert_scalar(value, hint, key)


def _convert_choice(value: object, choices: tuple[str, ...], key: str) -> object:
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1)
    fix = f"did you mean {near[0]}?" if near else f"choose {choices[0]}, for example" if len(choices) > 1 else ""
    raise ConfigError(f"{key}={value!r}: must be one of {', '.join(choices)}; {fix or f'set {key}={choices[0]}'}")


def _convert_tuple(value: object, members: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{key}={value!r}: must be a list; write {key}=[{value}]")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(value) != len(members):
        raise ConfigError(f"{key}={list(value)}: must have {len(members)} values, has {len(value)}; give all of them")
    return tuple(_convert(item, m, f"{key}[{i}]") for i, (item, m) in enumerate(zip(value, members, strict=True)))


def _convert_scalar(value: object, hint: type, key: str) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and is_number:
        if isinstance(value, int):
            return value
        fix = f"write {value:.0f}" if float(value).is_integer() else "round it"  # type: ignore[arg-type]
        raise ConfigError(f"{key}={value!r}: must be a whole number; {fix}")
    if hint is float and is_number:
        if not math.isfinite(value):  # type: ignore[arg-type]
            raise ConfigError(f"{key}={value!r}: must be finite; give a number")
        return float(value)  # type: ignore[arg-type]
    if hint is str and isinstance(value, str):
        return value
    rules = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
    given = "null" if value is None else f"{value!r}"
    raise ConfigError(f"{key}={given}: must be {rules[hint]}, not {type(value).__name__}; change the value")


def _example(key: str) -> str:
    section = _section_type(key_type(key))
    assert section is not None, key
    return f"{key}.{next(iter(field_types(section)))}=..."
