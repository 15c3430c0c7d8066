"""The folder for sockets that loader processes use: what killed runs left is removed, what lives is left alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_scale.data.loader_processes import worker_starts


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ldm-test-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def _names(base: Path) -> list[str]:
    return sorted(path.name for path in base.iterdir())


def test_only_what_nobody_holds_is_removed(base: Path) -> None:
    (base / "ldm-loader-killed" / "pymp-x").mkdir(parents=True)
    (base / "ldm-loader-killed" / "pymp-x" / "listener-x").touch()
    (base / "others").mkdir()
    (base / "ldm-loader-link").symlink_to(base / "others")
    with worker_starts(1):
        (first,) = set(_names(base)) - {"others", "ldm-loader-link"}
        with worker_starts(1):
            assert len(_names(base)) == 4
            assert first in _names(base)
        assert _names(base) == sorted([first, "others", "ldm-loader-link"])
    assert _names(base) == ["ldm-loader-link", "others"]


def test_without_processes_there_is_no_folder(base: Path) -> None:
    with worker_starts(0):
        assert _names(base) == []


def test_where_names_would_be_too_long_the_folder_is_elsewhere(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = base / ("x" * (70 - len(str(base))))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    before = set(os.listdir("/tmp"))
    with worker_starts(1) as start:
        assert _names(long) == []
        (folder,) = start.args[1:]  # type: ignore[attr-defined]
        assert folder.startswith("/tmp/ldm-loader-")
        assert os.path.basename(folder) not in before
    assert not os.path.exists(folder)
