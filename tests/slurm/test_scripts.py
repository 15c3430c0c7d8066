"""The job scripts as Slurm runs them, with a stand-in for training that starts at once (stand_in.py)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import TWO_NODES, Desk, Job, fresh_clone

STAND_IN = Path(__file__).with_name("stand_in.py")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose Python is the stand-in."""
    path = fresh_clone(tmp_path_factory.mktemp("clone"))
    (path / "slurm" / "settings.sh").write_text(f"python=({sys.executable} {STAND_IN})\n")
    return path


def _submit(desk: Desk, run_dir: Path, steps: int = 100000, options: tuple[str, ...] = TWO_NODES) -> Job:
    job = desk.submit("train_ldm", f"run_dir={run_dir}", f"steps={steps}", "seconds=0.1", options=options)
    return job


def _started(desk: Desk, run_dir: Path, options: tuple[str, ...] = TWO_NODES) -> Job:
    job = _submit(desk, run_dir, options=options)
    ready = [run_dir / "count", run_dir / "rank-0", run_dir / "rank-1"]
    desk.cluster.wait_for(lambda: all(path.exists() for path in ready), 60, f"ranks did not start: {job.log}")
    return job


@contextmanager
def _settings(clone: Path, more: str) -> Iterator[None]:
    """Lines added to the clone's settings."""
    path = clone / "slurm" / "settings.sh"
    before = path.read_text()
    path.write_text(before + more)
    try:
        yield
    finally:
        path.write_text(before)


def _signals(run_dir: Path, rank: int) -> list[str]:
    path = run_dir / f"rank-{rank}"
    return path.read_text().split() if path.exists() else []


def _rank(desk: Desk, node: str) -> int:
    """The stand-in's process there."""
    (pid,) = desk.cluster.pids(node, sys.executable)
    return pid


def test_each_node_has_its_rank(desk: Desk, tmp_path: Path) -> None:
    job = _submit(desk, tmp_path / "run", steps=2)
    job.wait_for_end()
    assert "2 ranks on n[1-2], rendezvous at 10.77.0.11:2" in job.log
    assert sorted(line for line in job.log.splitlines() if " at 0 on " in line) == [
        "0: at 0 on n1",
        "1: at 0 on n2",
    ]


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_a_warning_brings_the_job_back(desk: Desk, tmp_path: Path, name: str) -> None:
    job = _started(desk, tmp_path / "run")
    job.signal(name)
    job.wait_for_start(2)
    # The first rank that leaves makes srun send TERM to the other.
    assert [_signals(tmp_path / "run", rank)[0] for rank in (0, 1)] == [f"SIG{name}"] * 2
    desk.cluster.wait_for(lambda: "(start 2)" in job.log, 60, "no second start")


def test_a_time_limit_brings_the_job_back(desk: Desk, tmp_path: Path) -> None:
    options = (*TWO_NODES[:-1], "--time=1", "--signal=USR1@5")
    job = _started(desk, tmp_path / "run", options)
    job.wait_for_start(2)
    assert _signals(tmp_path / "run", 1)[0] == "SIGUSR1"


def test_a_requeue_by_the_operator(desk: Desk, tmp_path: Path) -> None:
    job = _started(desk, tmp_path / "run")
    desk.cluster.run("scontrol", "requeue", job.number)
    job.wait_for_start(2)
    assert [_signals(tmp_path / "run", rank)[0] for rank in (0, 1)] == ["SIGTERM"] * 2


def test_a_preemption_brings_the_job_back(desk: Desk, tmp_path: Path) -> None:
    job = _started(desk, tmp_path / "run")
    options = ("--partition=urgent", "--nodes=4", "--exclusive", "--ntasks-per-node=1", "--time=30")
    urgent = _submit(desk, tmp_path / "urgent", 10, options)
    job.wait_for_state("PENDING")
    urgent.wait_for_end()
    assert _signals(tmp_path / "run", 1)[0] == "SIGUSR1", "the warning of --signal, at once, and TERM after GraceTime"
    job.wait_for_start(2)


def test_scancel_ends_the_job_after_its_ranks(desk: Desk, tmp_path: Path) -> None:
    job = _started(desk, tmp_path / "run")
    job.cancel()
    job.wait_for_end("CANCELLED")
    assert [_signals(tmp_path / "run", rank) for rank in (0, 1)] == [["SIGTERM"]] * 2
    desk.cluster.wait_for(lambda: not job.cluster.pids("n1", sys.executable), 30, "ranks stayed")


@pytest.mark.parametrize("node", [0, 1])
def test_a_lost_node_brings_the_job_back_on_others(desk: Desk, tmp_path: Path, node: int) -> None:
    job = _started(desk, tmp_path / "run")
    lost = job.nodes[node]
    desk.cluster.kill_node(lost)
    try:
        job.wait_for_start(2)
        assert lost not in job.nodes
    finally:
        desk.cluster.start_node(lost)


@pytest.mark.parametrize("name", ["KILL", "USR1"])
def test_ranks_that_lose_their_peer_first_wait_for_slurm_to_notice(clone: Path, tmp_path: Path, name: str) -> None:
    """Where srun gives up before Slurm misses the node, as on real clusters: after seconds here, not a minute."""
    with (
        Cluster(tmp_path / "cluster", dead_after_s=60, kill_wait_s=3, message_s=10) as cluster,
        _settings(clone, "srun_options=(--wait=3)\n"),
    ):
        desk = Desk(cluster, clone)
        job = _started(desk, tmp_path / "run")
        first, lost = job.nodes
        cluster.kill_node(lost)
        # A broken connection makes a rank fail, or its watchdog ends it, before Slurm misses the node.
        cluster.kill(_rank(desk, first), name)
        job.wait_for_start(2)
        assert "a node does not answer; waiting for Slurm to notice" in job.log
        assert lost not in job.nodes


def test_a_rank_that_dies_ends_the_job_at_once(desk: Desk, tmp_path: Path) -> None:
    job = _started(desk, tmp_path / "run")
    started = time.monotonic()
    desk.cluster.kill(_rank(desk, job.nodes[1]), "KILL")
    job.wait_for_end("FAILED")
    assert time.monotonic() - started < 20
    assert job.starts == 1
    assert "the ranks ended with status 137" in job.log


def test_a_job_that_was_warned_stays_cancelled(desk: Desk, tmp_path: Path) -> None:
    """Both signals come before its ranks have ended a step."""
    job = desk.submit("train_ldm", f"run_dir={tmp_path / 'run'}", "steps=1000", "seconds=8")
    desk.cluster.wait_for(lambda: (tmp_path / "run" / "count").exists(), 60, f"no step: {job.log}")
    job.signal("USR1")
    job.cancel()
    job.wait_for_end("CANCELLED")
    assert set(_signals(tmp_path / "run", 0)) == {"SIGUSR1", "SIGTERM"}
    time.sleep(8)  # longer than a requeued job waits here
    assert (job.state, job.starts) == ("CANCELLED", 1)


def test_the_script_submits_itself_with_the_settings(desk: Desk, tmp_path: Path, clone: Path) -> None:
    """With the resources that stand in it, which the test's cluster seems to have."""
    arguments = (f"run_dir={tmp_path / 'run'}", "steps=1", "seconds=0.1")
    with _settings(clone, "export SBATCH_PARTITION=urgent\nprepare_job() { echo modules loaded; }\n"):
        answer = desk.cluster.run("slurm/train_ldm.sh", *arguments, cwd=clone)
        number = answer.split()[-1]
        job = Job(desk.cluster, number, clone / "slurm" / "logs" / f"train_ldm-{number}.out")
        job.wait_for_end()
        plain = desk.submit("train_ldm", *arguments)
        plain.wait_for_end()
    assert (job.facts["Partition"], plain.facts["Partition"]) == ("urgent", "normal")
    assert "note:" not in job.log
    assert "modules loaded" in job.log
    assert "16 ranks on n[1-2]" in job.log
    assert "note: SBATCH_PARTITION=urgent of slurm/settings.sh was not in effect when" in plain.log


def test_from_another_folder_the_job_says_where_it_belongs(desk: Desk, clone: Path, tmp_path: Path) -> None:
    script = str(clone / "slurm" / "train_ldm.sh")
    log = tmp_path / "log"
    options = ("sbatch", "--parsable", *TWO_NODES, f"--output={log}")
    number = desk.cluster.run(*options, script, "steps=1", cwd=tmp_path).strip()
    Job(desk.cluster, number, log).wait_for_end("FAILED")
    assert log.read_text() == f"error: {tmp_path} is not the root of ldm-scale; run sbatch there\n"


def test_no_name_and_no_argument_is_run(desk: Desk, tmp_path: Path) -> None:
    """A job's name, its variables and its arguments are full of commands that would leave a file."""
    canary = "$(touch canary-shell);`touch canary-tick`|touch canary-pipe&'\"\\n"
    run_dir = tmp_path / f"run {canary}"
    options = (*TWO_NODES, f"--job-name={canary}", f"--comment={canary}")
    submitted = desk.submit(
        "train_ldm", f"run_dir={run_dir}", "steps=1", "seconds=0.1", f"x={canary}", canary, "*", options=options
    )
    job = Job(desk.cluster, submitted.number, desk.clone / "slurm" / "logs" / f"{canary}-{submitted.number}.out")
    job.wait_for_end()
    assert "2 ranks on" in job.log
    assert (run_dir / "count").read_text() == "1"
    assert not [path for folder in (desk.clone, tmp_path, Path.cwd()) for path in folder.rglob("canary-*")]


def test_python_that_is_missing_is_named(desk: Desk, clone: Path, tmp_path: Path) -> None:
    settings = clone / "slurm" / "settings.sh"
    before = settings.read_text()
    settings.write_text("")
    (clone / ".venv").rename(clone / "elsewhere")
    try:
        job = _submit(desk, tmp_path / "run")
        job.wait_for_end("FAILED")
    finally:
        (clone / "elsewhere").rename(clone / ".venv")
        settings.write_text(before)
    assert f"error: {clone}/.venv/bin/python is missing; run 'make env' in this folder" in job.log
