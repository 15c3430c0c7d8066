"""Versions of the libraries that a run depends on: whether they are in their ranges, and what ranks compare."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

import ldm_kernels
import ldm_scale
from ldm_scale.errors import ConfigError

# What training loads. Pillow and hydra-core have floors for their security, DeepSpeed one version whose internals
# engine/zero.py knows.
TRAINING = ("torch", "deepspeed", "pillow", "hydra-core", "webdataset", "safetensors")
_COMPARED = (*TRAINING, "triton", "numpy", "torchvision")


def requirements() -> list[Requirement]:
    """What ldm-scale needs on this system, without its extras."""
    found = [Requirement(text) for text in declared()]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def declared() -> list[str]:
    """The requirements as pyproject.toml of the checkout has them, or else the installed package."""
    project = Path(ldm_scale.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return importlib.metadata.requires("ldm-scale") or []


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def misfits() -> Iterator[tuple[Requirement, str | None]]:
    """Requirements that are missing (None) or have a version outside their range."""
    for requirement in requirements():
        found = installed_version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield requirement, found


def require_versions() -> None:
    """Nothing, if the libraries that training loads are in their ranges.

    Raises: ConfigError naming each that is not.
    """
    wrong = [
        f"{requirement.name} {found or 'is not installed'} (needed {requirement.specifier})"
        for requirement, found in misfits()
        if requirement.name.lower() in TRAINING
    ]
    if wrong:
        raise ConfigError(
            f"not in the versions that ldm-scale is made for: {', '.join(wrong)}; run `make env`, or install them: "
            "Pillow's and hydra-core's bounds are for security, and checkpoints rely on DeepSpeed's exact version"
        )


@cache
def running_versions() -> dict[str, str]:
    """What ranks must have in common: Python, libraries, and our own sources by their digest."""
    versions = {"version of python": ".".join(platform.python_version_tuple()[:2])}
    versions |= {f"version of {name}": installed_version(name) or "not installed" for name in _COMPARED}
    return versions | {"digest of ldm_scale's sources": _sources_digest()}


def _sources_digest() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for package in (ldm_scale, ldm_kernels):
        assert package.__file__ is not None, "a package with an __init__"
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
