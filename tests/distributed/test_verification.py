"""Which checkpoint a run continues from: any damage to any file is found by all ranks, the one before is taken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config, TrainConfig
from ldm_scale.engine import early_checksums, env, verification
from ldm_scale.engine.checkpoint import PROGRESS, Trained, load_checkpoint, save_checkpoint
from ldm_scale.engine.early_checksums import EarlyChecksums
from ldm_scale.engine.rank_files import CHECKSUM, MANIFEST, complete_folders, images_of, json_crc32
from ldm_scale.engine.tensor_file import file_crc32
from ldm_scale.engine.verification import newest_verified
from ldm_scale.errors import CheckpointError
from tests.helpers.faulty import faults_set
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded import masters, max_difference, network, sharded, train_step

OLD, NEW = "images-0000000008", "images-0000000016"
FILES = ("rank-00000.safetensors", "rank-00001.safetensors", MANIFEST)


def _train_and_save(root: Path) -> None:
    trained = {"net": Trained(sharded(network(), 2))}
    for step, images in enumerate((8, 16)):
        train_step(trained["net"].model, step, 1e-2)
        save_checkpoint(root, images, trained, {"cur_images": images}, config_to_dict(Config()), 9)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("intact") / "run"
    run_ranks(_train_and_save, 2, run_dir / "checkpoints")
    assert json.loads((run_dir / PROGRESS).read_text()) == {"images": 16}
    return run_dir


def _flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def _swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit at the beginning": lambda p: _flip(p, 0),
    "a bit in the middle": lambda p: _flip(p, 0.5),
    "a bit at the end": lambda p: _flip(p, 1),
    "cut by a byte": lambda p: os.truncate(p, p.stat().st_size - 1),
    "cut to nothing": lambda p: os.truncate(p, 0),
    "a byte more": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "deleted": Path.unlink,
    "exchanged within the folder": lambda p: _swap(p, p.with_name(FILES[(FILES.index(p.name) + 1) % 3])),
    "exchanged with the one before": lambda p: _swap(p, p.parent.with_name(OLD) / p.name),
}


def _choose(root: Path) -> str:
    here = env.start(env.read_launch(), TrainConfig(device="cpu"))
    try:
        found = newest_verified(root, here.rank, EarlyChecksums(root, here.rank, here.world_size).of)
    except CheckpointError as error:
        return str(error)
    return found.path.name if found else "scratch"


def _choose_of_each(roots: list[Path]) -> list[str]:
    return [_choose(root) for root in roots]


def _copies(intact: Path, tmp_path: Path) -> dict[tuple[str, str], Path]:
    copies = {}
    for number, (file, damage) in enumerate((file, damage) for file in FILES for damage in DAMAGES):
        root = shutil.copytree(intact, tmp_path / f"run{number}") / "checkpoints"
        DAMAGES[damage](root / NEW / file)
        copies[file, damage] = root
    return copies


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_damage_to_every_file_is_found_by_all_ranks(tmp_path: Path, intact: Path, ranks: int) -> None:
    copies = _copies(intact, tmp_path)
    for chosen in run_ranks(_choose_of_each, ranks, list(copies.values())):
        for (file, damage), (root, outcome) in zip(copies, zip(copies.values(), chosen, strict=True), strict=True):
            if damage == "exchanged with the one before":
                assert f"no whole checkpoint is left in {root}: all are damaged" in outcome, (file, damage)
            else:
                assert outcome == OLD, (file, damage, outcome)
                assert sorted(p.name for p in root.iterdir()) == [f"damaged-{NEW}", OLD]
    assert run_ranks(_choose, ranks, intact / "checkpoints") == [NEW] * ranks


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage != "exchanged with the one before"])
def test_what_is_damaged_after_its_checksum_was_made_is_found(tmp_path: Path, intact: Path, damage: str) -> None:
    for file in FILES:
        root = shutil.copytree(intact, tmp_path / file) / "checkpoints"
        early = EarlyChecksums(root, 0, 1)
        assert early.of(root / NEW / FILES[0]) == file_crc32(root / NEW / FILES[0])
        DAMAGES[damage](root / NEW / file)
        found = newest_verified(root, 0, early.of)
        assert found is not None
        assert found.path.name == OLD, (file, damage)


def test_what_is_whole_is_read_once(tmp_path: Path, intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(early_checksums, "file_crc32", lambda path: (read.append(path.name), file_crc32(path))[1])
    root = shutil.copytree(intact, tmp_path / "run") / "checkpoints"
    parts = [EarlyChecksums(root, rank, 2) for rank in range(2)]
    for name, early in zip(FILES[:2], parts, strict=True):
        early.of(root / NEW / name)
    assert sorted(read) == list(FILES[:2])
    found = newest_verified(root, 0, EarlyChecksums(root, 0, 1).of)
    assert found is not None
    assert found.path.name == NEW
    assert sorted(read) == sorted(2 * FILES[:2])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"rank-00000.safetensors": 1}}', None])
def test_what_cannot_be_read_early_is_left_to_the_verification(
    tmp_path: Path, intact: Path, capfd: pytest.CaptureFixture[str], content: str | None
) -> None:
    root = shutil.copytree(intact, tmp_path / "run") / "checkpoints"
    manifest = root / NEW / MANIFEST
    manifest.unlink() if content is None else manifest.write_text(content)
    early = EarlyChecksums(root, 0, 1)
    assert early.of(root / NEW / FILES[0]) == file_crc32(root / NEW / FILES[0])
    assert capfd.readouterr().err == ""


def test_copies_under_other_names_are_left_alone(tmp_path: Path, intact: Path) -> None:
    root = shutil.copytree(intact, tmp_path / "run") / "checkpoints"
    for name in (f"{NEW}.bak", f"{NEW}-good", "images-24", "images-best"):
        shutil.copytree(root / NEW, root / name)
        _flip(root / name / FILES[0], 0.5)
    before = sorted(p.name for p in root.iterdir())
    assert run_ranks(_choose, 2, root) == [NEW] * 2
    assert sorted(p.name for p in root.iterdir()) == before
    assert [images_of(folder) for folder in complete_folders(root)] == [8, 16]


def test_folders_that_were_exchanged_as_wholes_are_found(tmp_path: Path, intact: Path) -> None:
    root = shutil.copytree(intact, tmp_path / "run") / "checkpoints"
    _swap(root / OLD, root / NEW)
    assert "has the manifest of 8 images: it was renamed or exchanged" in run_ranks(_choose, 1, root)[0]


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest is changed and states the CRC-32 of what it says now."""
    manifest = json.loads(path.read_text())
    del manifest[CHECKSUM]
    change(manifest)
    path.write_text(json.dumps(manifest | {CHECKSUM: json_crc32(manifest)}))


MALFORMED: dict[str, Callable[[Path], object]] = {
    "nested": lambda p: p.write_text("[" * 100_000 + "]" * 100_000),
    "null": lambda p: p.write_text("null"),
    "without files": lambda p: _rewrite(p, lambda m: m.pop("files")),
    "of text": lambda p: _rewrite(p, lambda m: m.update(images="16")),
    "without images": lambda p: _rewrite(p, lambda m: m.pop("images")),
    "without a state": lambda p: _rewrite(p, lambda m: m.pop("state")),
}


def test_a_manifest_that_is_no_manifest_is_damage(tmp_path: Path, intact: Path) -> None:
    roots = []
    for number, change in enumerate(MALFORMED.values()):
        roots.append(shutil.copytree(intact, tmp_path / f"run{number}") / "checkpoints")
        change(roots[-1] / NEW / MANIFEST)
    for chosen in run_ranks(_choose_of_each, 2, roots):
        assert chosen == [OLD] * len(MALFORMED)


def test_damage_is_told_with_its_file_and_nothing_is_overwritten(
    tmp_path: Path, intact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(intact, tmp_path / "run") / "checkpoints"
    (root / f"damaged-{NEW}").mkdir()
    _flip(root / NEW / FILES[1], 0.9)
    assert run_ranks(_choose, 2, root) == [OLD] * 2
    logged = capfd.readouterr().err
    assert f"DAMAGED CHECKPOINT {root / NEW}: {root / NEW / FILES[1]} is damaged: its CRC-32" in logged
    assert f"kept as {root}/damaged-{NEW}-2" in logged
    assert "remove the folder" not in logged
    assert "copy" not in logged
    assert (root / f"damaged-{NEW}-2" / FILES[1]).exists()


def test_a_run_without_a_checkpoint_begins_and_one_that_lost_all_does_not(tmp_path: Path, intact: Path) -> None:
    assert run_ranks(_choose, 2, tmp_path / "new" / "checkpoints") == ["scratch"] * 2
    run = shutil.copytree(intact, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    for message in run_ranks(_choose, 2, run / "checkpoints"):
        assert "no whole checkpoint is left" in message
        assert f"there is none, though the run had some ({run / PROGRESS}); put one back from a copy" in message
    damaged = shutil.copytree(intact, tmp_path / "damaged")
    (damaged / PROGRESS).unlink()
    for name in (OLD, NEW):
        _flip(damaged / "checkpoints" / name / FILES[0], 0.5)
    assert "all are damaged" in run_ranks(_choose, 2, damaged / "checkpoints")[1]
    # Nor the next time, when both have been renamed.
    assert f"there is none, though the run had some ({damaged}" in run_ranks(_choose, 2, damaged / "checkpoints")[1]
    shutil.rmtree(damaged / "checkpoints")
    assert run_ranks(_choose, 2, damaged / "checkpoints") == ["scratch"] * 2


def _choose_under_faults(root: Path, rules: str) -> str:
    verification.READ_PAUSES_S = (0.0, 0.0)
    os.environ["LDM_FAULTS"] = rules  # env.start reads it
    return _choose(root)


@pytest.mark.parametrize(
    ("rules", "outcome"),
    [
        ("eio:at=load.verify,rank=1,times=2", NEW),  # for a moment
        ("eio:at=load.verify,rank=1,times=3", OLD),  # for good: a bad sector
        ("erofs:at=load.verify,rank=1,times=3", "rank 1: [Errno 30] Read-only file system: nothing was changed"),
        ("flip:at=load.verify,rank=0", OLD),
    ],
)
def test_a_file_that_cannot_be_read_is_tried_again(tmp_path: Path, intact: Path, rules: str, outcome: str) -> None:
    root = shutil.copytree(intact, tmp_path / "run") / "checkpoints"
    for chosen in run_ranks(_choose_under_faults, 2, root, rules):
        assert chosen == outcome if outcome in (OLD, NEW) else outcome in chosen
    assert (root / NEW).exists() == (outcome != OLD)


def _load(root: Path) -> dict[str, Any]:
    trained = {"net": Trained(sharded(network(seed=12), 3))}
    found = newest_verified(root, trained["net"].model.environment.rank)
    assert found is not None
    with faults_set("eio:at=load.verify"):  # no file is looked at once more
        state = load_checkpoint(found.path, trained, verified=True)
    return {"state": state, "weights": masters(trained["net"].model)}


def _trained() -> dict[str, Any]:
    model = sharded(network(), 2)
    train_step(model, 0, 1e-2)
    return masters(model)


def test_the_one_before_is_loaded_after_damage(tmp_path: Path, intact: Path) -> None:
    root = shutil.copytree(intact, tmp_path / "run") / "checkpoints"
    _flip(root / NEW / FILES[0], 0.7)
    expected = run_ranks(_trained, 2)[0]
    for loaded in run_ranks(_load, 2, root):
        assert loaded["state"] == {"cur_images": 8}
        assert max_difference(loaded["weights"], expected) == 0


def test_an_unreadable_folder_is_not_taken_for_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(verification, "READ_PAUSES_S", ())

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may list any folder
    with pytest.raises(CheckpointError, match=r"Permission denied.*see to it that all ranks can read"):
        newest_verified(tmp_path / "checkpoints", 0)
