"""A training begins on a disk that is really full, meets a bad sample there, and goes on as ever once there is room."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from ldm_scale.data.sources.tars import index_tars
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.rank_files import images_of
from ldm_scale.telemetry import tensorboard
from ldm_scale.telemetry.tensorboard import read_metrics
from ldm_scale.train import main
from tests.helpers.commands import stage1
from tests.helpers.disks import fill, small_disk
from tests.helpers.ranks import started_ranks
from tests.helpers.shards import broken_png, make_sample, write_tar

TOTAL_IMAGES = 96
TOLD = (
    "starts.json cannot be written (No space left on device): free space there",
    ".lock cannot be written (No space left on device): free space there",
    "metrics.jsonl cannot be written (No space left on device): free space there",
    "tensorboard cannot be written (No space left on device): free space there",
    "bad_samples.jsonl cannot be written (No space left on device): free space there",
    "images-0000000008 not written (rank 0: [Errno 28] No space left on device); free space",
)


def test_a_full_disk_ends_nothing_and_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "RETRY_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("LDM_FAULTS", f"sleep:at=step.forward,seconds=0.05,times={TOTAL_IMAGES}")
    (tmp_path / "data").mkdir()
    samples = [(f"train{n:05d}", make_sample(n, 20, np.random.default_rng(n))) for n in range(16)]
    samples[3][1]["png"] = broken_png()
    shard = write_tar(tmp_path / "data" / "train-000000.tar", samples)
    index_tars([shard], tmp_path / "data" / "manifest.json", "train")
    with small_disk(tmp_path / "disk", 16) as disk:
        run_dir, filler = disk / "run", fill(disk / "filler")
        more = (f"train.total_images={TOTAL_IMAGES}", "train.log_every_images=8", "data.max_bad_share_of_shard=1")
        arguments = stage1(tmp_path, run_dir, *more)
        with started_ranks(main, 1, tmp_path / "logs", arguments) as (rank,):
            given_up = time.monotonic() + 60
            while not (rank.log.exists() and all(line in rank.output for line in TOLD)):
                assert rank.process.is_alive() and time.monotonic() < given_up, rank.output  # noqa: PT018
                time.sleep(0.02)
            filler.unlink()
            assert rank.end() == 0, rank.output
        assert "Traceback" not in rank.output
        assert "tensorboard is written again; figures and pictures between images 0 and" in rank.output
        assert [row["images"] for row in read_metrics(run_dir) if "images_per_s" in row] == list(
            range(8, TOTAL_IMAGES + 1, 8)
        )
        (bad,) = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
        assert bad["key"] == "train-000000/train00003"
        newest = latest_checkpoint(run_dir / "checkpoints")
        assert newest is not None
        assert images_of(newest) == TOTAL_IMAGES
        assert json.loads((run_dir / "result.json").read_text())["images"] == TOTAL_IMAGES
