"""Once a run has had a checkpoint that can be read, it has one, whatever happens: random saves, kills, damage."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from ldm_scale import faults
from ldm_scale.engine.checkpoint import retire_older
from ldm_scale.engine.folder_write import write_folder
from ldm_scale.engine.rank_files import Piece
from ldm_scale.engine.verification import newest_verified
from ldm_scale.errors import CheckpointError

OPERATIONS = 14
CONTENT = {"models": {"net": {}}, "state": {}, "config": {}}  # of manifests


class Killed(BaseException):
    """What stands for kill -9 within one process: nothing catches it, the disk stays as it is."""


class Disk:
    """A run's checkpoints under random operations."""

    def __init__(self, root: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.random = root, random.Random(seed)
        self.images = 0
        self.history: list[str] = []
        self._until_kill = -1
        monkeypatch.setattr(faults, "reach", self._reach)

    def _reach(self, point: str, path: Path | None = None) -> None:
        self._until_kill -= 1
        if self._until_kill == 0:
            raise Killed(point)

    def save(self) -> None:
        self._save(-1)

    def killed_save(self) -> None:
        self._save(self.random.randint(1, 9))

    def _save(self, until_kill: int) -> None:
        again = self.random.random() < 0.3  # set back before: the same images once more
        self.images += 0 if again else 8
        self._until_kill = until_kill
        values = torch.rand(self.random.randint(1, 40), generator=torch.Generator().manual_seed(self.images))
        pieces = [Piece("net", kind, "weight", (len(values),), 0, values) for kind in ("weight", "ema")]

        def retire() -> None:
            retire_older(self.root, self.images, 0, keep=self.random.randint(1, 3))

        try:
            write_folder(self.root, self.images, 0, pieces, CONTENT, after=retire)
        except Killed as kill:
            self.history[-1] += f" at {kill}"
        self._until_kill = -1

    def torn_folder(self) -> None:
        """A folder as a copy that broke off would leave it, of fewer or more images."""
        folder = self.root / f"images-{self.random.randrange(0, self.images + 40):010d}"
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "rank-00000.safetensors").write_bytes(b"half")
            if self.random.random() < 0.5:
                (folder / "manifest.json").write_text('{"format": ')

    def damage(self) -> None:
        """A bit, a cut or a deletion; never of the last whole one."""
        whole = self.whole()
        if len(whole) < 2:
            return
        path = self.random.choice(sorted(self.random.choice(whole).iterdir()))
        content = bytearray(path.read_bytes())
        kind = self.random.choice(("flip", "cut", "delete"))
        if kind == "flip":
            content[self.random.randrange(len(content))] ^= 1
        path.write_bytes(content[:-1] if kind == "cut" else content)
        if kind == "delete":
            path.unlink()

    def resume(self) -> None:
        whole = self.whole()
        if whole:
            found = newest_verified(self.root, 0)
            assert found is not None
            assert found.path == whole[-1]
            self.images = found.manifest["images"]
        else:
            with pytest.raises(CheckpointError, match="no whole checkpoint is left") if self._torn() else nullcontext():
                newest_verified(self.root, 0)

    def _torn(self) -> bool:
        return any(self.root.glob("images-*")) or any(self.root.glob("damaged-*"))

    def whole(self) -> list[Path]:
        """Whole checkpoints, by a check of this test's own; what a kill has put aside counts under its own name."""
        found = []
        folders = [*self.root.glob("images-*"), *self.root.glob(".replaced-*")] if self.root.exists() else []
        names = {folder.name for folder in folders}
        for folder in folders:
            if folder.name.startswith(".replaced-") and folder.name.removeprefix(".replaced-") in names:
                continue
            try:
                manifest = json.loads((folder / "manifest.json").read_text())
                stated = manifest.pop("crc32")
                good = stated == zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
                for name, record in manifest["files"].items():
                    good &= zlib.crc32((folder / name).read_bytes()) == record["crc32"]
            except (OSError, ValueError, KeyError):
                good = False
            if good:
                found.append(self.root / folder.name.removeprefix(".replaced-"))
        return sorted(found)


@pytest.mark.parametrize("seed", range(40))
def test_a_run_that_had_a_whole_checkpoint_always_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here cuts the power
    disk = Disk(tmp_path / "run" / "checkpoints", seed, monkeypatch)
    operations = (disk.save, disk.save, disk.killed_save, disk.killed_save, disk.torn_folder, disk.damage, disk.resume)
    had = False
    for _ in range(OPERATIONS):
        operation = disk.random.choice(operations)
        disk.history.append(operation.__name__)
        operation()
        has = bool(disk.whole())
        assert has or not had, disk.history
        had = has
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
