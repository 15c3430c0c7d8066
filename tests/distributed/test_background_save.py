"""Saves beside training: the bytes of a save that training waits for, none lost at a stop, always the same memory."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale import faults
from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config, EmaConfig
from ldm_scale.engine import env
from ldm_scale.engine.background_save import HostMemory
from ldm_scale.engine.checkpoint import Trained, save_checkpoint, start_save
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.engine.folder_write import FolderWrite
from ldm_scale.engine.rank_files import Piece, complete_folders, read_manifest
from ldm_scale.operations.train import train
from ldm_scale.training import saving
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.sharded import network, sharded, train_step
from tests.helpers.shards import make_dataset


def _saved(root: Path, in_background: bool, stage: int, precision: str) -> tuple[bool, int, int]:
    """Whether it was still writing after two more steps; bytes of this process's tensors before and after the next."""
    model = sharded(network(), stage, precision)
    item = Trained(model, ShardedEma(model, EmaConfig(half_life_images=10.0)), {"counts": torch.arange(3.0)})
    trained = {"net": item}
    train_step(model, 0, 1e-2)
    train_step(model, 1, 1e-2)
    values = {"cur_images": 16}, config_to_dict(Config())
    if not in_background:
        save_checkpoint(root, 16, trained, *values, 9)
        return False, 0, 0
    gate, write = threading.Event(), FolderWrite.write

    def write_late(folder: FolderWrite, pieces: Iterable[Piece]) -> None:
        assert gate.wait(60)
        write(folder, pieces)

    setattr(FolderWrite, "write", write_late)  # noqa: B010  # in this rank's own process
    memory = HostMemory()
    save = start_save(root, 16, trained, *values, 9, memory)
    train_step(model, 2, 1e-1)
    train_step(model, 3, 1e-1)
    item.buffers["counts"] += 1
    was_writing = save.is_working
    gate.set()
    assert save.advance() is None
    assert save.advance() is not None
    before = _tensor_bytes()
    save = start_save(root.parent / "next", 32, trained, *values, 9, memory)
    assert save.advance() is None
    assert save.advance() is not None
    return was_writing, before, _tensor_bytes()


def _tensor_bytes() -> int:
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum(
        storage.nbytes() for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found}.values()
    )


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_save_beside_training_has_the_bytes_of_one_that_training_waits_for(
    tmp_path: Path, stage: int, precision: str
) -> None:
    run_ranks(_saved, 2, tmp_path / "waiting" / "checkpoints", False, stage, precision)
    for was_writing, before, after in run_ranks(_saved, 2, tmp_path / "beside" / "checkpoints", True, stage, precision):
        assert was_writing, "training did not go on meanwhile: the test shows nothing"
        assert after < before + 1_000, "each save takes memory of its own"  # megabytes; small tensors come and go
    (waiting,), (beside,) = (complete_folders(tmp_path / name / "checkpoints") for name in ("waiting", "beside"))
    files = sorted(path.name for path in waiting.iterdir())
    assert files == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    for name in files:
        assert (beside / name).read_bytes() == (waiting / name).read_bytes(), name


def test_copies_go_to_the_same_memory_unless_they_do_not_fit() -> None:
    def copied(*values: torch.Tensor) -> list[Piece]:
        return memory.copies(Piece("net", "weight", str(n), tuple(v.shape), 0, v) for n, v in enumerate(values))

    memory, threads = HostMemory(), torch.get_num_threads()
    first = [piece.values.data_ptr() for piece in copied(torch.ones(3), torch.zeros(2))]
    long, same = copied(torch.ones(5, dtype=torch.bfloat16), torch.full((2,), 4.0))
    assert long.values.tolist() == [1.0] * 5
    assert long.values.dtype == torch.bfloat16
    assert (same.values.data_ptr(), same.values.tolist()) == (first[1], [4.0, 4.0])
    assert torch.get_num_threads() == threads, "training goes on with its own number"


def _run(config: Config, rules: str, stop_at_save: bool) -> bool:
    os.environ[faults.VARIABLE] = rules
    if stop_at_save:
        start = saving.start_save

        def start_and_stop(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return start(*args)

        setattr(saving, "start_save", start_and_stop)  # noqa: B010
    return train(config, env.read_launch())


def _config(tmp_path: Path, name: str, **cadence: Any) -> Config:
    manifest = tmp_path / "data" / "manifest.json"
    if not manifest.exists():
        manifest = make_dataset(tmp_path / "data", num_samples=16, resolution=20)
        tiny_artifact(tmp_path / "artifact")
    train = {"total_images": 40, "checkpoint_every_images": 8, "keep_checkpoints": 9}
    return tiny_config("diffusion", manifest, tmp_path / name, train=train | cadence, zero={"stage": 2})


def test_a_run_that_saves_beside_training_equals_one_that_waits(tmp_path: Path) -> None:
    slow = "sleep:at=save.write,seconds=0.3,times=3"  # so that one is due while the one before is still written
    for name, in_background in (("waiting", False), ("beside", True)):
        config = _config(tmp_path, name, async_checkpoints=in_background)
        assert run_ranks(_run, 2, config, slow if in_background else "", False) == [True, True]
    waiting, beside = (complete_folders(tmp_path / name / "checkpoints") for name in ("waiting", "beside"))
    assert [path.name for path in beside] == [path.name for path in waiting]
    assert len(waiting) == 5
    for one, other in zip(waiting, beside, strict=True):
        before, after = read_manifest(one), read_manifest(other)
        assert after["files"] == before["files"]
        assert after["models"] == before["models"]
        assert after["state"] | {"training_s": 0} == before["state"] | {"training_s": 0}


def test_a_run_that_is_stopped_while_it_saves_completes_that_save(tmp_path: Path) -> None:
    config = _config(tmp_path, "run", checkpoint_every_images=16, total_images=400)
    slow = "sleep:at=save.write,seconds=1.5"
    assert run_ranks(_run, 2, config, slow, True) == [False, False]
    assert [path.name for path in complete_folders(tmp_path / "run" / "checkpoints")] == [
        "images-0000000016",
        "images-0000000024",
    ]


@pytest.mark.rest
def test_a_run_that_all_ranks_end_by_an_error_completes_its_save(tmp_path: Path) -> None:
    config = _config(tmp_path, "run", checkpoint_every_images=16, total_images=400, max_skipped_steps=2)
    rules = "sleep:at=save.write,seconds=3; nan:at=step.loss,rank=1,nth=3,times=2"
    with pytest.raises(AssertionError, match="NumericsError: 2 steps in a row could not be made"):
        run_ranks(_run, 2, config, rules, False)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["images-0000000016"]
