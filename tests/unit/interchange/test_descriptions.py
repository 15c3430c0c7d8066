"""ldm_scale.json in exports of ours, which anybody may have edited: what cannot be is one line that names the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.config.schema import ConditioningConfig
from ldm_scale.errors import CheckpointError, LdmScaleError
from ldm_scale.interchange.artifact import DESCRIPTION, Artifact, DiffusionArtifact, read_description
from ldm_scale.interchange.compvis_write import fill_compvis_folder
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.sources import read_source
from tests.helpers.compvis import SELF, first_stage, second_stage

VERSIONED = {"format": "ldm-scale-autoencoder", "version": 1}
JUNK: tuple[Any, ...] = (None, -1, 0, "x", [], {}, True, float("nan"), [[]], 10**30)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An autoencoder and a model in the layouts of two other programs."""
    folder = tmp_path_factory.mktemp("exports")
    model = second_stage(SELF, ConditioningConfig())
    found = {}
    for layout, fill in (("diffusers", fill_diffusers_folder), ("compvis", fill_compvis_folder)):
        parts: tuple[Artifact | DiffusionArtifact, ...] = (first_stage(), model)
        for name, artifact in zip(("autoencoder", "model"), parts, strict=True):
            found[f"{layout} {name}"] = folder / layout / name
            (folder / layout / name).mkdir(parents=True)
            fill(folder / layout / name, artifact)
    return found


@pytest.fixture(params=["diffusers autoencoder", "diffusers model", "compvis autoencoder", "compvis model"])
def export(request: pytest.FixtureRequest, exports: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(exports[request.param], tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "'autoencoder' is None: must be a section of keys and values; export the model again"),
        ({"autoencoder": {}}, r"has format and version \(None, None\), expected \('ldm-scale-autoencoder', 1\)"),
        ({"autoencoder": VERSIONED}, "'autoencoder' is None: must be a section"),
        ({"autoencoder": VERSIONED | {"autoencoder": {}}}, "'latent_statistics' is None: must be a section"),
        ({"autoencoder": []}, r"'autoencoder' is \[\]: must be a section"),
        ({"diffusion": {}}, "'autoencoder' is None|'unet' is None"),
    ],
)
def test_a_description_without_its_parts(export: Path, content: dict[str, Any], message: str) -> None:
    layout = {key: value for key, value in json.loads((export / DESCRIPTION).read_text()).items() if key == "layout"}
    (export / DESCRIPTION).write_text(json.dumps(layout | content))
    with pytest.raises(CheckpointError, match=message) as raised:
        read_source(export)
    assert str(export / DESCRIPTION) in str(raised.value)
    assert "\n" not in str(raised.value)


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key in it, and every key in what they hold."""
    found = [path] if path else []
    if isinstance(content, dict):
        for key, value in content.items():
            found += _places(value, (*path, key))
    return found


def _replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    return content | {path[0]: _replaced(content[path[0]], path[1:], value)}


def _outcome(folder: Path, content: Any, read: Callable[[Path], object]) -> str:
    (folder / DESCRIPTION).write_text(json.dumps(content))
    try:
        read(folder)
    except LdmScaleError as error:
        return "refused" if "\n" not in str(error) else "in several lines"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def test_whatever_stands_there_is_used_or_refused(export: Path) -> None:
    """Each key with anything in its place; of what passes by itself, some with the weights."""
    content = json.loads((export / DESCRIPTION).read_text())
    tried = [(path, junk, _replaced(content, path, junk)) for path in _places(content) for junk in JUNK]
    found = {(path, repr(junk)): _outcome(export, changed, read_description) for path, junk, changed in tried}
    assert {key: outcome for key, outcome in found.items() if outcome not in ("read", "refused")} == {}
    passed = [(path, junk, changed) for path, junk, changed in tried if found[path, repr(junk)] == "read"]
    assert len(passed) < len(tried) / 2
    for path, junk, changed in passed[:: len(passed) // 12]:
        assert _outcome(export, changed, read_source) in ("read", "refused"), (path, junk)
