"""Configurations of diffusers' models and schedulers as any version wrote them, with the defaults filled in.

An import goes by one rule: from their configuration ours is derived, from ours the model of diffusers that an export
would write, and the two configurations must agree in every key. So a switch that our networks do not have is refused by
its name, also one that this program has never heard of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_scale.errors import CheckpointError, ConfigError, LdmScaleError
from ldm_scale.interchange.foreign_section import Section
from ldm_scale.interchange.safetensors_io import describe_difference, read_json
from ldm_scale.telemetry.log import get_logger

CONFIG = "config.json"
Plain = dict[str, Any]


def read_class_config(path: Path) -> Plain:
    """The configuration in a file that names the class that it is of.

    Raises: CheckpointError if it is none.
    """
    config = read_json(path)
    if not isinstance(config.get("_class_name"), str):
        raise CheckpointError(f"{path} has no _class_name: it is no configuration of diffusers; give the folder of one")
    return config


def filled(instance: Any, given: Mapping[str, Any], path: Path) -> Plain:
    """What a model of diffusers was built from, defaults included; says once what it does not know."""
    return _known({key: value for key, value in instance.config.items() if not key.startswith("_")}, {}, given, path)


def filled_in(constructor: Any, given: Mapping[str, Any], path: Path) -> Plain:
    """As `filled`, of what was not built: a scheduler computes tables of numbers that nobody has looked at."""
    parameters = inspect.signature(constructor).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in ("self", "kwargs")}
    return _known(defaults, given, given, path)


def _known(config: Plain, values: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> Plain:
    unknown = {k: v for k, v in given.items() if not k.startswith("_") and k not in config and v not in (None, False)}
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        get_logger().warning(f"{path}: {listed}: unknown to this version of diffusers, which leaves it out")
    return {key: values.get(key, default) for key, default in config.items()}


def empty_model(model_class: Any, folder: Path) -> tuple[Plain, nn.Module]:
    """Configuration and model of `folder` as diffusers builds it, without memory behind its weights.

    Raises: CheckpointError if diffusers cannot.
    """
    path = folder / CONFIG
    given = read_json(path)
    Section.of_json(path, given).require_possible()
    with building(path, model_class.__name__), torch.device("meta"):
        model = model_class.from_config(given)
    return filled(model, given, path), model


@contextmanager
def building(path: Path, name: str) -> Iterator[None]:
    """Turns whatever the constructors of diffusers and transformers raise into an error that names the file.

    For a configuration that they do not know they fail wherever they first use it, some without a message.
    """
    try:
        yield
    except LdmScaleError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path}: diffusers cannot build this {name} ({reason}); is it of another version?"
        ) from error


def require_same(
    path: Path, theirs: Plain, held: Plain, normal: Callable[[Plain], Plain], free: frozenset[str]
) -> None:
    """Nothing, if two configurations of one class describe the same function; keys in `free` change none.

    Raises: CheckpointError that names the first key in which they differ.
    """
    given, computed = normal(theirs), normal(held)
    for key in sorted((given.keys() | computed.keys()) - free):
        if not key.startswith("_") and given.get(key) != computed.get(key):
            raise CheckpointError(
                f"{path}: {key}={_shown(theirs.get(key))}: the networks here compute what {key}="
                f"{_shown(held.get(key))} says, and have no such option; this model cannot be imported"
            )


def require_tensors(path: Path, theirs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Nothing, if the weights in a folder are those of its configuration.

    Raises: CheckpointError that names the tensors that are missing, not expected or of another shape.
    """
    difference = describe_difference(expected, theirs)
    if difference:
        raise CheckpointError(f"the weights in {path.parent} are not those of {path.name}: {difference}")


def multipliers(section: Section) -> tuple[int, tuple[int, ...]]:
    """Base width and the levels' multiples of it.

    Raises: CheckpointError if there is none.
    """
    widths = section.integers("block_out_channels", at_least=1)
    if not widths or any(width % widths[0] for width in widths):
        raise CheckpointError(
            f"{section.name}: block_out_channels={list(widths)}: levels here are whole multiples of the first one's "
            "width; this model cannot be imported"
        )
    return widths[0], tuple(width // widths[0] for width in widths)


def side_of(section: Section) -> int | None:
    """sample_size, of which older files and some classes have two; None where it is not said.

    Raises: CheckpointError if it is no size of a square.
    """
    value = section.get("sample_size")
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return section.integer("sample_size", at_least=1)
    sides = section.integers("sample_size", at_least=1)
    if len(set(sides)) != 1:
        raise CheckpointError(
            f"{section.name}: sample_size={list(sides)}: models here are trained on squares, whose side is one number; "
            "write that one there"
        )
    return sides[0]


def checked(path: Path, check: Callable[[], object]) -> None:
    """Nothing, if `check` of a configuration of ours passes.

    Raises: CheckpointError that names the file.
    """
    try:
        check()
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that cannot be built here: {error}") from error


def tuples(config: Plain) -> Plain:
    """The configuration with its lists as tuples: files have the one, constructors the other."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _shown(value: object) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
