"""What a change must not break: both stages over two nodes, one requeue, one lost node."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import stage1, stage2
from tests.slurm.jobs import Desk, digest

IMAGES = ("train.total_images=160", "train.checkpoint_every_images=16")


@pytest.mark.timeout(300)
def test_both_stages_train_over_two_nodes(desk: Desk, inputs: Path, tmp_path: Path) -> None:
    first = desk.submit("train_autoencoder", *stage1(inputs, tmp_path / "stage1", *IMAGES))
    first.wait_for_end()
    assert "2 ranks on n[1-2]" in first.log
    assert (tmp_path / "stage1" / "artifact").is_dir()
    artifact = f"artifact={tmp_path / 'stage1' / 'artifact'}"
    second = desk.submit("train_ldm", *stage2(inputs, tmp_path / "stage2", *IMAGES, artifact))
    second.wait_for_end()
    assert second.images == 160


@pytest.mark.timeout(600)
def test_comes_back_after_a_warning_and_after_a_lost_node(desk: Desk, inputs: Path, tmp_path: Path) -> None:
    undisturbed = desk.submit("train_ldm", *stage2(inputs, tmp_path / "undisturbed", *IMAGES))
    undisturbed.wait_for_end()
    job = desk.submit("train_ldm", *stage2(inputs, tmp_path / "disturbed", *IMAGES), slow_s=0.5)
    job.wait_for_images(16)
    job.signal("USR1")
    job.wait_for_images(48, starts=2)
    before = job.images
    lost = job.nodes[-1]
    desk.cluster.kill_node(lost)
    try:
        job.wait_for_start(3)
        assert lost not in job.nodes
        job.wait_for_end()
    finally:
        desk.cluster.start_node(lost)
    assert "continuing at" in job.log
    assert before < job.images == 160
    assert digest(tmp_path / "disturbed") == digest(tmp_path / "undisturbed")
