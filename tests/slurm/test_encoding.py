"""Encoding that is disturbed keeps what is done, and its cache is that of an undisturbed job."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_dataset
from tests.slurm.jobs import Desk

pytestmark = pytest.mark.timeout(3600)
NUM_SHARDS = 150


def _cache(folder: Path) -> dict[str, str]:
    """Digest of each latent shard, by name; [] while there are none."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.tar")}


def test_encoding_comes_back_and_keeps_what_is_done(desk: Desk, tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=4 * NUM_SHARDS, samples_per_shard=4, resolution=20)
    artifact = tiny_artifact(tmp_path / "artifact")
    more = ("--resolution", "16", "--batch", "1", "--workers", "0")
    quiet = desk.submit("encode_latents", str(artifact), str(manifest), "--out", str(tmp_path / "quiet"), *more)
    quiet.wait_for_end()
    job = desk.submit("encode_latents", str(artifact), str(manifest), "--out", str(tmp_path / "out"), *more)
    desk.cluster.wait_for(lambda: len(_cache(tmp_path / "out")) >= 4, 600, "no shards")
    job.signal("USR1")
    job.wait_for_start(2)
    kept = len(_cache(tmp_path / "out"))
    job.wait_for_end()
    assert 4 <= kept < NUM_SHARDS
    last_start = job.log.rpartition("(start 2)")[2]
    assert sum(map(int, re.findall(r"encode: (\d+) of \d+ shards", last_start))) < NUM_SHARDS
    assert _cache(tmp_path / "out") == _cache(tmp_path / "quiet")
    shards = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]["shards"]
    assert [shard["kind"] for shard in shards] == ["latents"] * NUM_SHARDS
