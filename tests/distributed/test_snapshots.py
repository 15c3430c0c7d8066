"""Snapshots of averages, and profiles that nobody kept: reconstructed offline, equal to tracked ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config, EmaConfig
from ldm_scale.engine import collectives
from ldm_scale.engine.checkpoint import Trained, load_checkpoint, save_checkpoint
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.engine.rank_files import complete_folders, read_manifest
from ldm_scale.engine.snapshots import remove_snapshots_beyond, save_snapshot, snapshot_bytes
from ldm_scale.engine.weights import read_full_tensors
from ldm_scale.errors import CheckpointError, ConfigError
from tests.helpers.cases import rarely
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded import BATCH, max_difference, network, sharded, train_step, whole

KEPT = EmaConfig(half_life_images=40.0, power_stds=(0.05, 0.1), snapshot_dtype="fp32")
TRACKED = EmaConfig(half_life_images=0.0, power_stds=(0.03, 0.07, 0.15))
STEPS, EVERY = 96, 6


def _run(root: Path, stage: int, ema: EmaConfig, past_the_checkpoint: int = 0) -> dict[str, dict[str, Tensor]]:
    """The tracked averages at the checkpoint of a run that kept and snapshot the others."""
    model = sharded(network(), stage)
    trained = {"net": Trained(model, ShardedEma(model, ema)), "other": Trained(sharded(network(), stage))}
    tracked = ShardedEma(model, TRACKED)
    kept = trained["net"].ema
    assert kept is not None
    result: dict[str, dict[str, Tensor]] = {}
    for step in range(STEPS + past_the_checkpoint):
        images = (step + 1) * BATCH
        train_step(model, step, 2e-2)
        kept.update(images, BATCH)
        tracked.update(images, BATCH)
        if (step + 1) % EVERY == 0:
            save_snapshot(root / "snapshots", images, trained, ema, {})
        if step + 1 == STEPS:
            save_checkpoint(root / "checkpoints", images, trained, {}, config_to_dict(Config()), 1)
            averages = (kept.averages | tracked.averages).items()
            result = {name: whole(model, values)[0] for name, values in averages}
    return result


@pytest.mark.parametrize(
    ("ranks", "stage"), [(1, 0), rarely(2, 0), rarely(1, 1), (2, 1), rarely(2, 2), rarely(1, 3), (2, 3)]
)
def test_a_reconstructed_profile_equals_a_tracked_one(tmp_path: Path, ranks: int, stage: int) -> None:
    tracked = run_ranks(_run, ranks, tmp_path, stage, KEPT)[0]
    (path,) = complete_folders(tmp_path / "checkpoints")
    for std in TRACKED.power_stds:
        name = f"ema={std}"
        nearest = min(max_difference(tracked[f"ema={kept}"], tracked[name]) for kept in KEPT.power_stds)
        assert nearest > 1e-3, "the kept averages would pass for it"
        assert max_difference(read_full_tensors(path, "net", name), tracked[name]) < 0.05 * nearest, name
    for name in ("ema", "ema=0.05", "ema=0.1"):
        assert max_difference(read_full_tensors(path, "net", name), tracked[name]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A run of 12 steps beyond its checkpoint, with snapshots in fp16, and its tracked averages."""
    root = tmp_path_factory.mktemp("run")
    return root, run_ranks(_run, 2, root, 1, replace(KEPT, snapshot_dtype="fp16"), 2 * EVERY)[0]


def _checkpoint(run_dir: Path) -> Path:
    return complete_folders(run_dir / "checkpoints")[-1]


def test_half_precision_takes_half_and_loses_little(run: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    root, tracked = run
    difference = max_difference(read_full_tensors(_checkpoint(root), "net", "ema=0.07"), tracked["ema=0.07"])
    largest = max(float(tensor.abs().max()) for tensor in tracked["ema=0.07"].values())
    assert 0 < difference < 1e-3 * largest
    folder = complete_folders(root / "snapshots")[0]
    manifest = read_manifest(folder)
    assert manifest["models"].keys() == {"net"}, "a model without averages has none to keep"
    assert manifest["models"]["net"]["tensors"].keys() == {"ema=0.05", "ema=0.1"}, "the exponential one is no basis"
    parameters = sum(parameter.numel() for parameter in network().parameters())
    files = [(folder / name).read_bytes() for name in manifest["files"]]
    content = sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)  # without safetensors' headers
    assert content == 2 * 2 * parameters
    fields = EmaConfig(power_stds=(0.05, 0.1), snapshot_every_images=100)
    assert snapshot_bytes(fields, 1050, parameters) == 10 * content
    assert snapshot_bytes(replace(fields, snapshot_every_images=0), 1050, parameters) == 0


def test_snapshots_after_the_checkpoint_are_not_of_it(
    run: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    root, _ = run
    before = read_full_tensors(_checkpoint(root), "net", "ema=0.07")
    shutil.copytree(root, tmp_path / "run")
    snapshots = tmp_path / "run" / "snapshots"
    assert remove_snapshots_beyond(snapshots, STEPS * BATCH) == 2
    assert [folder.name for folder in complete_folders(snapshots)][-1] == f"images-{STEPS * BATCH:010d}"
    assert len(complete_folders(snapshots)) == STEPS // EVERY
    after = read_full_tensors(_checkpoint(tmp_path / "run"), "net", "ema=0.07")
    assert max_difference(after, before) == 0
    assert remove_snapshots_beyond(snapshots, 0) == STEPS // EVERY
    assert remove_snapshots_beyond(tmp_path / "nowhere", 0) == 0


def test_what_cannot_be_reconstructed_is_refused(
    run: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    path = _checkpoint(run[0])
    with pytest.raises(
        CheckpointError, match=r"ema=0.005 cannot .* profiles 0.05, 0.1 there and in 15 snapshots .*misses it by \d\d%"
    ):
        read_full_tensors(path, "net", "ema=0.005")
    with pytest.raises(CheckpointError, match=r"ema=0.07 cannot be reconstructed.*power_stds=\[\]\); use raw weights"):
        read_full_tensors(path, "other", "ema=0.07")
    for name in ("ema=", "ema=wide", "ema=0", "ema=-0.1", "ema=0.3", "ema=nan", "mean", "raw=0.05", ""):
        with pytest.raises(ConfigError, match=f"^weights {name}: must be raw, ema or ema=STD"):
            read_full_tensors(path, "net", name)
    # Without its snapshots the checkpoint's own two averages reach what lies between them, and no more.
    shutil.copytree(path, tmp_path / "checkpoints" / path.name)
    alone = tmp_path / "checkpoints" / path.name
    between = read_full_tensors(alone, "net", "ema=0.07")
    assert max_difference(between, run[1]["ema=0.07"]) < 0.2 * max_difference(run[1]["ema=0.05"], run[1]["ema=0.1"])
    with pytest.raises(CheckpointError, match=r"in 0 snapshots .*allowed 10%.*snapshot more often"):
        read_full_tensors(alone, "net", "ema=0.2")


def test_a_damaged_snapshot_is_refused_with_the_files_name(
    run: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    damaged = complete_folders(tmp_path / "run" / "snapshots")[3] / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{damaged} is damaged.*remove the folder {damaged.parent}"):
        read_full_tensors(_checkpoint(tmp_path / "run"), "net", "ema=0.07")
    shutil.rmtree(damaged.parent)
    assert read_full_tensors(_checkpoint(tmp_path / "run"), "net", "ema=0.07")


def _overflow(root: Path) -> str:
    model = sharded(network(), 2)
    item = Trained(model, ShardedEma(model, KEPT))
    assert item.ema is not None
    if model.environment.rank == 1:
        item.ema.averages["ema=0.1"][-1][0] = 1e5
    try:
        save_snapshot(root, 8, {"net": item}, replace(KEPT, snapshot_dtype="fp16"), {})
    except CheckpointError as error:
        message = str(error)
    assert not list(root.iterdir())
    collectives.barrier()  # before another rank begins the next one
    save_snapshot(root, 8, {"net": item}, KEPT, {})
    return message


def test_a_weight_beyond_half_precision_fails_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    for message in run_ranks(_overflow, 2, tmp_path):
        assert "rank 1: net/ema=0.1/" in message
        assert "set ema.snapshot_dtype=fp32" in message
    assert len(complete_folders(tmp_path)) == 1


def _averages_after(root: Path, stage: int, interrupted_at: int | None) -> dict[str, dict[str, Tensor]]:
    """The averages after eight steps, continued by other objects in between if the run is interrupted."""
    model = sharded(network(), stage)
    item = Trained(model, ShardedEma(model, KEPT))
    for step in range(8):
        if step == interrupted_at:
            path = save_checkpoint(root, step * BATCH, {"net": item}, {}, config_to_dict(Config()), 1)
            model = sharded(network(seed=12), stage)
            item = Trained(model, ShardedEma(model, KEPT))
            load_checkpoint(path, {"net": item})
        train_step(model, step, 2e-2)
        assert item.ema is not None
        item.ema.update((step + 1) * BATCH, BATCH)
    assert item.ema is not None
    return {name: whole(model, values)[0] for name, values in item.ema.averages.items()}


@pytest.mark.parametrize("stage", [0, rarely(1), rarely(2), 3])
def test_a_resumed_run_has_the_same_averages_bit_for_bit(tmp_path: Path, stage: int) -> None:
    through = run_ranks(_averages_after, 2, tmp_path, stage, None)[0]
    resumed = run_ranks(_averages_after, 2, tmp_path, stage, 3)[0]
    assert through.keys() == {"ema", "ema=0.05", "ema=0.1"}
    for name, tensors in through.items():
        assert max_difference(resumed[name], tensors) == 0, name
