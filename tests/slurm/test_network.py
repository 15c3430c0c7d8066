"""A node whose network fails: named by the watchdog, and the job comes back, with it or without it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_scale.engine.hangs import FOLDER, VERDICT
from tests.helpers.commands import stage2
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Desk, Job, digest

pytestmark = pytest.mark.timeout(3600)
STEP_S, OTHER_S = 10.0, 120.0
# Saves are rare: a step that follows one has the time of both.
IMAGES = ("train.total_images=200", "train.checkpoint_every_images=80")
WATCHED = (f"watchdog.step_s={STEP_S}", f"watchdog.other_s={OTHER_S}", "train.log_every_images=8")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that misses a node long after a message to it was given up, as real ones do."""
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=3, dead_after_s=60, message_s=10) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, clone: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    Desk(cluster, clone).submit("train_ldm", *stage2(inputs, run_dir, *IMAGES)).wait_for_end()
    return digest(run_dir)


def _steps(job: Job, starts: int) -> int:
    """Images of the last step, 0 before the start's first."""
    assert job.run_dir is not None
    path = job.run_dir / "metrics.jsonl"
    if job.starts < starts or not path.exists():
        return 0
    lines = path.read_text().splitlines()
    return int(json.loads(lines[-1])["images"]) if lines else 0


def _cut(desk: Desk, job: Job, images: int, starts: int) -> str:
    """The node whose cable was pulled, soon after the step of so many images."""
    desk.cluster.wait_for(lambda: _steps(job, starts) >= images, 600, f"no step\n{job.log}")
    node = job.nodes[1]
    ranks = [(name, job.rank_process(name)) for name in job.nodes]
    desk.cluster.set_link(node, up=False)
    cut_at = time.monotonic()
    desk.cluster.wait_for(
        lambda: all(pid not in desk.cluster.pids(name) for name, pid in ranks), STEP_S + 20, f"ranks stayed\n{job.log}"
    )
    assert time.monotonic() - cut_at < STEP_S + 10
    verdicts = sorted((job.run_dir / FOLDER).glob(f"*/{VERDICT}"))
    text = verdicts[-1].read_text()
    assert text.startswith(f"culprit: the network of host {node};"), text
    assert text.endswith("eth0 is down\n"), text
    return node


def test_a_lost_network_is_named_and_the_job_comes_back(
    desk: Desk, inputs: Path, undisturbed: str, tmp_path: Path
) -> None:
    job = desk.submit("train_ldm", *stage2(inputs, tmp_path / "run", *IMAGES, *WATCHED), slow_s=1.0)
    node = _cut(desk, job, images=104, starts=1)
    desk.cluster.set_link(node, up=True)
    job.wait_for_start(2)
    assert "its ranks stopped to be started again" in job.log
    node = _cut(desk, job, images=136, starts=2)
    try:
        job.wait_for_start(3)
        assert node not in job.nodes
        job.wait_for_end()
    finally:
        desk.cluster.set_link(node, up=True)
    assert digest(tmp_path / "run") == undisturbed
