"""Training that is disturbed in every way that Slurm knows ends with the weights of a run that nothing happened to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import stage1, stage2
from tests.helpers.resumptions import logged
from tests.slurm.jobs import IMAGES, TWO_NODES, Desk, Job, digest, gradient_bytes

pytestmark = pytest.mark.timeout(3600)
STEPS = 6


def test_comes_back_from_everything_that_asks_for_it(
    desk: Desk, inputs: Path, undisturbed: str, tmp_path: Path
) -> None:
    # Slurm looks at time limits twice a minute: fifteen steps.
    job = desk.submit("train_ldm", *stage2(inputs, tmp_path / "run", *IMAGES), slow_s=2.0)
    job.wait_for_images(8)
    for number, disturb in enumerate((_warn_all, _warn_one, _requeue, _reach_time_limit, _preempt), start=1):
        disturb(desk, job, tmp_path)
        job.wait_for_start(number + 1)
        job.wait_for_images(job.images + 8, starts=number + 1)
    job.wait_for_end()
    assert job.log.count("(start ") == job.starts >= 6
    assert digest(tmp_path / "run") == undisturbed


def _warn_all(desk: Desk, job: Job, folder: Path) -> None:
    job.signal("USR2")


def _warn_one(desk: Desk, job: Job, folder: Path) -> None:
    desk.cluster.kill(job.rank_process(job.nodes[1]), "USR1")


def _requeue(desk: Desk, job: Job, folder: Path) -> None:
    desk.cluster.run("scontrol", "requeue", job.number)


def _reach_time_limit(desk: Desk, job: Job, folder: Path) -> None:
    """Less than the notice of the warning is left, which comes at once."""
    starts = job.starts
    minutes = sum(int(part) * scale for part, scale in zip(job.facts["RunTime"].split(":"), (60, 1, 0), strict=True))
    desk.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes + 2}")
    desk.cluster.wait_for(lambda: job.starts > starts, 120, f"no warning: {job.log}")
    desk.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")


def _preempt(desk: Desk, job: Job, folder: Path) -> None:
    options = ("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null")
    urgent = desk.cluster.run("sbatch", "--parsable", *options, "--wrap=sleep 1").strip()
    Job(desk.cluster, urgent, folder / "urgent.out").wait_for_end()


def test_ends_when_it_is_told_to_and_the_same_command_continues(
    desk: Desk, inputs: Path, undisturbed: str, tmp_path: Path
) -> None:
    arguments = stage2(inputs, tmp_path / "run", *IMAGES)
    first = desk.submit("train_ldm", *arguments, slow_s=1.0)
    first.wait_for_images(8)
    desk.cluster.kill(first.rank_process(first.nodes[1]), "TERM")  # one rank alone
    first.wait_for_end()
    assert "stopped by another rank at" in first.log
    assert 8 <= first.images < 320
    second = desk.submit("train_ldm", *arguments, slow_s=1.0)
    second.wait_for_images(first.images + 8)
    second.cancel()
    second.wait_for_end("CANCELLED")
    desk.cluster.wait_for(lambda: "stopped by SIGTERM at" in second.log, 30, second.log)
    third = desk.submit("train_ldm", *arguments)
    third.wait_for_end()
    assert [job.starts for job in (first, second, third)] == [1, 1, 1]
    assert digest(tmp_path / "run") == undisturbed


def test_two_engines_come_back_from_a_lost_first_node(desk: Desk, inputs: Path, tmp_path: Path) -> None:
    images = ("train.total_images=96", "train.checkpoint_every_images=16")
    desk.submit("train_autoencoder", *stage1(inputs, tmp_path / "undisturbed", *images)).wait_for_end()
    job = desk.submit("train_autoencoder", *stage1(inputs, tmp_path / "run", *images), slow_s=1.0)
    job.wait_for_images(32)
    lost = job.nodes[0]  # with the job's script and rank 0
    desk.cluster.kill_node(lost)
    try:
        job.wait_for_start(2)
        assert lost not in job.nodes
        job.wait_for_end()
    finally:
        desk.cluster.start_node(lost)
    assert digest(tmp_path / "run") == digest(tmp_path / "undisturbed")


def test_a_killed_rank_ends_the_job_and_the_next_continues(
    desk: Desk, inputs: Path, undisturbed: str, tmp_path: Path
) -> None:
    arguments = stage2(inputs, tmp_path / "run", *IMAGES)
    first = desk.submit("train_ldm", *arguments, slow_s=1.0)
    first.wait_for_images(16)
    desk.cluster.kill(first.rank_process(first.nodes[1]), "KILL")
    first.wait_for_end("FAILED", timeout_s=30)
    desk.submit("train_ldm", *arguments).wait_for_end()
    assert digest(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("stage", [1, 2])
def test_the_same_weights_and_losses_on_one_two_and_four_nodes(
    desk: Desk, inputs: Path, tmp_path: Path, stage: int
) -> None:
    """And what the ranks exchange goes over the network."""
    script, arguments_of = {1: ("train_autoencoder", stage1), 2: ("train_ldm", stage2)}[stage]
    keys = (f"train.total_images={8 * STEPS}", "train.log_every_images=8", "zero.stage=2")
    digests, figures, sent = {}, {}, {}
    for nodes in (1, 2, 4):
        layout = (f"--nodes={nodes}", f"--ntasks-per-node={4 // nodes}", *TWO_NODES[2:])
        run_dir = tmp_path / f"on-{nodes}"
        before = _sent(desk, nodes)
        job = desk.submit(script, *arguments_of(inputs, run_dir, *keys), options=layout)
        job.wait_for_end()
        assert f"4 ranks on n{'[1-' * (nodes > 1)}{nodes}" in job.log
        sent[nodes] = [after - was for after, was in zip(_sent(desk, nodes), before, strict=True)]
        digests[nodes], figures[nodes] = digest(run_dir), logged(run_dir)
    assert len(set(digests.values())) == 1, digests
    assert sorted(figures[1]) == [8 * step for step in range(1, STEPS + 1)]
    assert all(any(name.startswith("loss") for name in row) for row in figures[1].values())
    assert figures[1] == figures[2] == figures[4]
    # Half of the ranks are elsewhere: of each gradient, and of each weight that came of it, half has to get there.
    exchanged = STEPS * gradient_bytes(tmp_path / "on-1")
    assert min(sent[2]) > exchanged > 4 * sent[1][0], (sent, exchanged)
    assert min(sent[4]) > exchanged / 2, (sent, exchanged)


def _sent(desk: Desk, nodes: int) -> list[int]:
    """Bytes that the first nodes have sent to others."""
    return [desk.cluster.bytes_sent(f"n{number}") for number in range(1, nodes + 1)]
