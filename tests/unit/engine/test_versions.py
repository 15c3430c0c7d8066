"""Versions outside their ranges are refused before a run starts, by name; ranks compare what they run."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

import ldm_scale
from ldm_scale.engine import versions
from ldm_scale.engine.versions import require_versions, running_versions
from ldm_scale.errors import ConfigError


def test_the_installed_versions_pass_and_the_floors_are_there() -> None:
    require_versions()
    declared = {requirement.name: requirement.specifier for requirement in versions.requirements()}
    assert not declared["pillow"].contains("12.9.9")
    assert declared["pillow"].contains("13.0.0")
    assert not declared["torch"].contains("2.9.1")
    assert str(declared["deepspeed"]).startswith("==")
    assert not declared["hydra-core"].contains("1.3.7")


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("pillow", "12.1.0", "pillow 12.1.0 (needed >=13.0.0)"),
        ("torch", "2.9.1+cu128", "torch 2.9.1+cu128 (needed >=2.11)"),
        ("deepspeed", "0.19.9", "deepspeed 0.19.9 (needed ==0.19.8)"),
        ("webdataset", None, "webdataset is not installed (needed >=1.0)"),
    ],
)
def test_a_version_outside_its_range_is_named(
    name: str, version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookup(asked: str) -> str:
        if asked != name:
            return found[asked]
        if version is None:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version

    found = {
        requirement.name: versions.installed_version(requirement.name) or "" for requirement in versions.requirements()
    }
    monkeypatch.setattr(importlib.metadata, "version", lookup)
    with pytest.raises(ConfigError) as error:
        require_versions()
    assert f"made for: {said}; run `make env`" in str(error.value)


def test_ranks_compare_libraries_and_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = running_versions()
    assert own["version of torch"] == importlib.metadata.version("torch")
    package = tmp_path / "ldm_scale"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(ldm_scale, "__file__", str(package / "__init__.py"))
    running_versions.cache_clear()
    other = running_versions()
    running_versions.cache_clear()
    assert {name for name in own if own[name] != other[name]} == {"digest of ldm_scale's sources"}
