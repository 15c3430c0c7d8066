"""Checkpoints: read by any number of ranks at any stage, exact, refused when damaged, never half written."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config, EmaConfig
from ldm_scale.engine import collectives
from ldm_scale.engine.checkpoint import Trained, latest_checkpoint, load_checkpoint, save_checkpoint
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.engine.rank_files import read_manifest
from ldm_scale.engine.weights import read_full_tensors
from ldm_scale.engine.zero import MOMENTS
from ldm_scale.errors import CheckpointError
from ldm_scale.models.build import build_seeded
from tests.helpers.faulty import faults_set
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded import (
    BATCH,
    Network,
    masters,
    max_difference,
    moments,
    network,
    predict,
    sharded,
    train_step,
    whole,
)

EMA = EmaConfig(half_life_images=10.0, warmup_ratio=0.0, power_stds=(0.2,))
STATE = {"cur_images": 16, "note": "as it was given"}


def _start(module: nn.Module, stage: int, precision: str = "fp32") -> dict[str, Trained]:
    model = sharded(module, stage, precision)
    return {"net": Trained(model, ShardedEma(model, EMA))}


def _content(item: Trained) -> dict[str, dict[str, Tensor]]:
    assert item.ema is not None
    kinds = {key: moments(item.model, key) for key in MOMENTS}
    averages = {name: whole(item.model, values)[0] for name, values in item.ema.averages.items()}
    return kinds | {"weight": masters(item.model)} | averages


def _train(item: Trained, steps: range) -> None:
    assert item.ema is not None
    for step in steps:
        train_step(item.model, step, 1e-2)
        item.ema.update((step + 1) * BATCH, BATCH)


def _save(root: Path, images: int, trained: dict[str, Trained], keep: int = 9) -> Path:
    return save_checkpoint(root, images, trained, STATE, config_to_dict(Config()), keep)


def _train_and_save(root: Path, stage: int, precision: str) -> dict[str, Any]:
    trained = _start(network(), stage, precision)
    _train(trained["net"], range(2))
    path = _save(root, 16, trained)
    return {"path": path, "content": _content(trained["net"]), "prediction": predict(trained["net"].model)}


def _load(path: Path, stage: int, precision: str) -> dict[str, Any]:
    trained = _start(network(seed=12), stage, precision)
    state = load_checkpoint(path, trained)
    model = trained["net"].model
    report = {"state": state, "content": _content(trained["net"]), "prediction": predict(model)}
    return report | {"steps": model.optimizer_steps}


@pytest.mark.parametrize(
    ("saved", "loaded", "precision"),
    [
        ((2, 2), (1, 0), "fp32"),
        ((2, 2), (2, 3), "fp32"),
        ((2, 2), (1, 1), "fp32"),
        ((2, 3), (1, 2), "fp32"),
        ((2, 0), (2, 1), "fp32"),
        ((1, 1), (2, 0), "fp32"),
        ((1, 0), (2, 3), "fp32"),
        ((2, 3), (2, 0), "bf16"),
        ((2, 0), (1, 2), "bf16"),
    ],
)
def test_any_ranks_and_stage_read_what_any_other_wrote(
    tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int], precision: str
) -> None:
    written = run_ranks(_train_and_save, saved[0], tmp_path, saved[1], precision)[0]
    content = written["content"]
    assert max_difference(content["ema"], content["ema=0.2"]) > 1e-4, "the averages cannot be told apart"
    for weights, kind in (("raw", "weight"), ("ema", "ema"), ("ema=0.20", "ema=0.2")):
        assert max_difference(read_full_tensors(written["path"], "net", weights), content[kind]) == 0
    for report in run_ranks(_load, loaded[0], written["path"], loaded[1], precision):
        assert report["state"] == STATE
        assert report["steps"] == 2
        assert report["content"].keys() == content.keys()
        for kind, tensors in content.items():
            assert max_difference(report["content"][kind], tensors) == 0, kind
            assert max(float(tensor.abs().max()) for tensor in tensors.values()) > 0, f"{kind} is all zero"
        assert torch.allclose(report["prediction"], written["prediction"], rtol=0, atol=1e-6)


def _write_rows(stage: int, restart: bool) -> dict[str, Any]:
    trained = _start(build_seeded(lambda: Network(9), 11), stage)
    item = trained["net"]
    _train(item, range(2))
    before = _content(item)
    rows = torch.tensor([1, 8, 4])
    values = torch.arange(15.0).view(3, 5) / 10
    item.write_rows("first.weight", rows, values, restart)
    content = _content(item)
    after = item.model.module.first(torch.eye(5)) - item.model.module.first(torch.zeros(1, 5))
    return {"before": before, "content": content, "computing": after.T.detach().clone(), "values": values, "rows": rows}


@pytest.mark.parametrize(
    ("ranks", "stage", "restart"),
    [(1, 0, True), (2, 0, False), (2, 1, True), (2, 2, False), (2, 3, True), (2, 3, False), (3, 2, True)],
)
def test_rows_are_written_into_masters_and_the_weights_that_compute(ranks: int, stage: int, restart: bool) -> None:
    for report in run_ranks(_write_rows, ranks, stage, restart):
        rows, values, name = report["rows"], report["values"], "first.weight"
        expected = report["before"]["weight"][name].clone()
        expected[rows] = values
        assert torch.equal(report["content"]["weight"][name], expected)
        torch.testing.assert_close(report["computing"], expected, rtol=0, atol=1e-6)
        zero = torch.zeros(())
        for kind, value in (("ema", values), ("ema=0.2", values), *((key, zero) for key in MOMENTS)):
            remembered = report["before"][kind][name].clone()
            assert remembered[rows].any(), "zero before: the test shows nothing"
            if restart:
                remembered[rows] = value
            assert torch.equal(report["content"][kind][name], remembered), kind
        others = {n: t for n, t in report["before"]["weight"].items() if n != name}
        assert max_difference({n: report["content"]["weight"][n] for n in others}, others) == 0


def _load_without_buffer(path: Path) -> None:
    trained = _start(network(), 0)
    trained["net"].buffers["codebook/counts"] = torch.ones(3)
    load_checkpoint(path, trained)


def test_a_checkpoint_without_what_the_run_remembers_is_refused(tmp_path: Path) -> None:
    path = run_ranks(_train_and_save, 1, tmp_path, 0, "fp32")[0]["path"]
    with pytest.raises(AssertionError, match=r"does not hold codebook/counts of the net: an earlier version"):
        run_ranks(_load_without_buffer, 1, path)


COPIES = ("0000000004.bak", "0000000004-good", "4", "best")  # such as people make, whole, beside the checkpoints


def _save_often(root: Path) -> list[list[str]]:
    trained = _start(network(), 1)
    left = []
    for images in (0, 8, 16, 1_000_000_000):
        _save(root, images, trained, keep=2)
        left.append(sorted(path.name for path in root.iterdir()))
    _save(root, 1_000_000_000, trained, keep=2)  # the same count again
    left.append(sorted(path.name for path in root.iterdir()))
    return left


def test_old_checkpoints_and_what_a_killed_save_left_are_removed(tmp_path: Path) -> None:
    killed = tmp_path / ".tmp-images-0000000004"
    killed.mkdir()
    (killed / "rank-00000.safetensors").write_bytes(b"half")
    others = ["images-0000000012", *(f"images-{name}" for name in COPIES)]
    for name in others:
        (tmp_path / name).mkdir()
    for name in others[1:]:  # the first is not ours to judge: no manifest
        (tmp_path / name / "manifest.json").write_text("{}")
    lists = run_ranks(_save_often, 1, tmp_path)[0]
    names = [f"images-{n:010d}" for n in (0, 8, 16, 1_000_000_000)]
    assert lists == [sorted([*kept, *others]) for kept in ([names[0]], names[0:2], names[1:3], names[2:4], names[2:4])]
    assert latest_checkpoint(tmp_path) == tmp_path / names[3]
    assert read_full_tensors(tmp_path / names[3], "net", "raw").keys() == dict(network().named_parameters()).keys()


def test_the_latest_checkpoint_is_the_newest_with_a_manifest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for images in (900, 10_000, 20_000):
        (tmp_path / f"images-{images:010d}").mkdir()
    assert latest_checkpoint(tmp_path) is None
    for images in (900, 10_000):
        (tmp_path / f"images-{images:010d}" / "manifest.json").write_text("{}")
    for name in COPIES:
        (tmp_path / f"images-{name}").mkdir()
        (tmp_path / f"images-{name}" / "manifest.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "images-0000010000"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(run_ranks(_train_and_save, 2, tmp_path_factory.mktemp("intact"), 2, "fp32")[0]["path"])


def _cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


RANK_1 = "rank-00001.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file cut by a byte": (RANK_1, lambda p: _cut(p, p.stat().st_size - 1)),
    "an empty file": (RANK_1, lambda p: _cut(p, 0)),
    "a missing file": (RANK_1, Path.unlink),
    "a flipped bit in the values": (RANK_1, lambda p: _flip(p, p.stat().st_size - 3)),
    "a flipped bit in the header": (RANK_1, lambda p: _flip(p, 20)),
    "half a manifest": ("manifest.json", lambda p: _cut(p, p.stat().st_size // 2)),
    "an empty manifest": ("manifest.json", lambda p: _cut(p, 0)),
    "a missing manifest": ("manifest.json", Path.unlink),
    "a manifest of another program": ("manifest.json", lambda p: p.write_text('{"format": "other", "version": 1}')),
    "a manifest that is a list": ("manifest.json", lambda p: p.write_text("[]")),
}


def _loading_errors(paths: Sequence[Path]) -> list[str]:
    trained = _start(network(), 1)
    errors = []
    for path in paths:
        try:
            load_checkpoint(path, trained)
        except CheckpointError as error:
            errors.append(str(error))
        else:
            errors.append("loaded")
    return errors


def test_damaged_checkpoints_are_refused_with_the_files_name(tmp_path: Path, intact: Path) -> None:
    paths = []
    for name, (file, damage) in DAMAGES.items():
        paths.append(tmp_path / name / intact.name)
        shutil.copytree(intact, paths[-1])
        damage(paths[-1] / file)
    loading = run_ranks(_loading_errors, 1, [*paths, intact])[0]
    assert loading.pop() == "loaded"
    for (name, (file, _)), path, message in zip(DAMAGES.items(), paths, loading, strict=True):
        expected = "has no manifest.json" if name == "a missing manifest" else str(path / file)
        assert expected in message, f"{name}: {message}"
        with pytest.raises(CheckpointError) as caught:
            read_full_tensors(path, "net", "raw")
        assert expected in str(caught.value), name


def test_no_changed_byte_of_a_manifest_passes(tmp_path: Path, intact: Path) -> None:
    path = tmp_path / intact.name
    shutil.copytree(intact, path)
    manifest = path / "manifest.json"
    original = manifest.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        content = bytearray(original)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        manifest.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(path)
    manifest.write_bytes(original)
    assert read_manifest(path)["state"] == STATE


class _Deeper(Network):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(7, 7)


def _misfits(path: Path) -> list[str]:
    messages = []
    for module, name in ((Network(width=9), "net"), (_Deeper(), "net"), (nn.Linear(5, 1), "net"), (network(), "other")):
        try:
            load_checkpoint(path, {name: Trained(sharded(module, 1))})
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_another_architecture_is_refused_with_the_tensors_names(intact: Path) -> None:
    wider, deeper, other, model = run_ranks(_misfits, 1, intact)[0]
    assert all(str(intact) in message for message in (wider, deeper, other, model))
    assert "first.weight: (7, 5) saved, (9, 5) configured" in wider
    assert "missing middle.bias, middle.weight" in deeper
    assert "missing bias, weight; unknown first.bias, first.weight, last.bias" in other
    assert "holds net, not other" in model
    with pytest.raises(CheckpointError, match="holds net, not other"):
        read_full_tensors(intact, "other", "raw")


def _save_with(root: Path, ema: EmaConfig | None) -> Path:
    model = sharded(network(), 0)
    return _save(root, 16, {"net": Trained(model, ema and ShardedEma(model, ema))})


def _load_with(path: Path, ema: EmaConfig) -> dict[str, Any] | str:
    model = sharded(network(seed=12), 2)
    trained = {"net": Trained(model, ShardedEma(model, ema))}
    try:
        load_checkpoint(path, trained)
    except CheckpointError as error:
        return str(error)
    return _content(trained["net"])


def test_without_an_average_the_weights_take_its_place(tmp_path: Path) -> None:
    path = run_ranks(_save_with, 2, tmp_path, None)[0]
    with pytest.raises(CheckpointError, match=r"no EMA of net .*half_life_images=0\); use raw weights"):
        read_full_tensors(path, "net", "ema")
    content = run_ranks(_load_with, 1, path, EmaConfig(half_life_images=10.0))[0]
    assert max_difference(content["ema"], content["weight"]) == 0
    assert max_difference(content["weight"], dict(network().named_parameters())) == 0


def test_a_profile_cannot_be_added_to_a_run_but_left_out(tmp_path: Path) -> None:
    path = run_ranks(_save_with, 1, tmp_path, EmaConfig(half_life_images=0.0, power_stds=(0.05, 0.1)))[0]
    for message in run_ranks(_load_with, 2, path, EmaConfig(power_stds=(0.05, 0.07))):
        assert f"{path} has no average ema=0.07 of the net" in message
        assert "cannot begin at 16 images; set ema.power_stds=[0.05,0.1] and" in message
    content = run_ranks(_load_with, 1, path, EmaConfig(half_life_images=0.0, power_stds=(0.1,)))[0]
    assert content.keys() == {"weight", "ema=0.1", *MOMENTS}
    assert max_difference(content["ema=0.1"], dict(network().named_parameters())) == 0


def _failing_save(root: Path, rules: str) -> str:
    """What a save says under those faults, after one that worked and before another."""
    trained = _start(network(), 2)
    _train(trained["net"], range(1))
    _save(root, 8, trained)
    _train(trained["net"], range(1, 2))
    message = "saved"
    with faults_set(rules, trained["net"].model.environment.rank):
        try:
            _save(root, 16, trained, keep=1)
        except CheckpointError as caught:
            message = str(caught)
    left = sorted(path.name for path in root.iterdir())
    assert left == ["images-0000000008"], left
    collectives.barrier()
    _save(root, 24, trained)
    return message


@pytest.mark.parametrize(
    ("rank", "point", "action", "says"),
    [
        (1, "save.begin", "erofs", "Read-only file system"),
        (1, "save.write", "enospc", "No space left on device"),
        (0, "save.write", "eio", "Input/output error"),
        (1, "save.sync", "eio", "Input/output error"),
        (1, "save.sync", "flip", "reads back from the disk as other bytes"),
        (1, "save.sync", "truncate", "reads back from the disk as other bytes"),
        (1, "save.reports", "eio", "Input/output error"),
        (0, "save.manifest", "enospc", "No space left on device"),
        (0, "save.rename", "eio", "Input/output error"),
    ],
)
def test_a_save_that_cannot_write_fails_on_all_ranks_and_leaves_nothing(
    tmp_path: Path, rank: int, point: str, action: str, says: str
) -> None:
    root = tmp_path / "checkpoints"
    for message in run_ranks(_failing_save, 2, root, f"{action}:at={point},rank={rank}"):
        assert str(root / "images-0000000016") in message
        assert f"rank {rank}: " in message
        assert says in message
    for images in (8, 24):
        read_full_tensors(root / f"images-{images:010d}", "net", "ema")


def _save_into(root: Path) -> str:
    try:
        _save(root, 8, _start(network(), 1))
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_folder_that_cannot_be_made_fails_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for message in run_ranks(_save_into, 2, tmp_path / "file" / "checkpoints"):
        assert "rank 0: " in message
        assert "Not a directory" in message
