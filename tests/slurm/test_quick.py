"""What a change must not break: both stages over two nodes, one requeue, one lost node."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.commands import stage1, stage2
from tests.slurm.jobs import IMAGES, Desk, digest

pytestmark = pytest.mark.timeout(1800)


def test_both_stages_train_over_two_nodes(desk: Desk, inputs: Path, tmp_path: Path) -> None:
    first = desk.submit("train_autoencoder", *stage1(inputs, tmp_path / "stage1", *IMAGES, "train.total_images=32"))
    first.wait_for_end()
    assert "2 ranks on n[1-2]" in first.log
    artifact = f"artifact={tmp_path / 'stage1' / 'artifact'}"
    run_dir = tmp_path / "stage2"
    second = desk.submit("train_ldm", *stage2(inputs, run_dir, *IMAGES, "train.total_images=32", artifact))
    second.wait_for_end()
    assert (first.images, second.images) == (32, 32)
    assert "gloo's messages go through eth0" in first.log


def test_comes_back_after_a_warning_and_after_a_lost_node(
    desk: Desk, inputs: Path, undisturbed: str, tmp_path: Path
) -> None:
    job = desk.submit("train_ldm", *stage2(inputs, tmp_path / "run", *IMAGES), slow_s=0.5)
    job.wait_for_images(16)
    job.signal("USR1")
    job.wait_for_images(job.images + 24, starts=2)
    before, lost = job.images, job.nodes[-1]
    desk.cluster.kill_node(lost)
    try:
        job.wait_for_start(3)
        assert lost not in job.nodes
        job.wait_for_end()
    finally:
        desk.cluster.start_node(lost)
    assert int(re.findall(r"continuing at (\d+) images", job.log)[-1]) >= before
    assert digest(tmp_path / "run") == undisturbed
