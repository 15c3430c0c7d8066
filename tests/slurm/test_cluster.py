"""The harness itself: it leaves nothing behind, whatever ends it, and does not meet another cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT

pytestmark = pytest.mark.timeout(300)
OWNER = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
with Cluster(Path(sys.argv[1]), nodes=1) as cluster:
    cluster.run("sbatch", "--output=/dev/null", "--wrap=sleep 1000")
    cluster.wait_for(lambda: "R" in cluster.run("squeue", "-h", "-o", "%t"), 30, "no job")
    print(cluster.space, flush=True)
    time.sleep(1000)
"""


def _machine() -> tuple[str, str, list[str]]:
    """What a cluster could leave behind beside processes and its folder."""
    links = subprocess.run(["ip", "-oneline", "link"], check=True, capture_output=True, text=True).stdout
    named = Path("/run/netns")
    return links, Path("/proc/mounts").read_text(), sorted(os.listdir(named)) if named.exists() else []


def _processes(space: str) -> list[str]:
    """Processes of a process namespace that are not yet gone."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns" / "pid") == space:
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def _require_gone(space: str) -> None:
    deadline = time.monotonic() + 20
    while _processes(space):
        assert time.monotonic() < deadline, _processes(space)
        time.sleep(0.1)


def test_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    before = _machine()
    spaces = []

    def fail() -> None:
        with Cluster(tmp_path / "c", nodes=1) as cluster:
            cluster.run("sbatch", "--output=/dev/null", "--wrap=sleep 1000")
            spaces.append(cluster.space)
            assert len(_processes(cluster.space)) > 3
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    _require_gone(spaces[0])
    assert _machine() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_after_its_owner_was_ended(tmp_path: Path, number: signal.Signals) -> None:
    before = _machine()
    command = [sys.executable, "-c", OWNER, str(tmp_path / "c")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout is not None
        try:
            space = owner.stdout.readline().strip()
            deadline = time.monotonic() + 30  # Slurm calls a job running before its first process is
            while not any("sleep" in line for line in _processes(space)):
                assert time.monotonic() < deadline, _processes(space)
                time.sleep(0.1)
            owner.send_signal(number)
            owner.wait(30)
        finally:
            owner.kill()
    _require_gone(space)
    assert _machine() == before


def test_two_clusters_do_not_meet(tmp_path: Path) -> None:
    with Cluster(tmp_path / "a", nodes=1) as first, Cluster(tmp_path / "b", nodes=2) as second:
        assert first.run("srun", "--nodes=1", "hostname").split() == ["n1"]
        assert sorted(second.run("srun", "--nodes=2", "hostname").split()) == ["n1", "n2"]
        first.stop()
        assert sorted(second.run("srun", "--nodes=2", "hostname").split()) == ["n1", "n2"]


def test_a_node_dies_and_comes_back(tmp_path: Path) -> None:
    with Cluster(tmp_path / "c", nodes=2, dead_after_s=5) as cluster:
        cluster.kill_node("n2")
        assert cluster.pids("n2") == []
        cluster.wait_for(lambda: "down" in cluster.run("sinfo", "-h", "-n", "n2", "-o", "%T"), 60, "n2 is not missed")
        cluster.start_node("n2")
        cluster.wait_for(lambda: "idle" in cluster.run("sinfo", "-h", "-n", "n2", "-o", "%T"), 60, "n2 is not back")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.slurm import cluster

    monkeypatch.setattr(cluster, "PROGRAMS", ("sh", "no-such-program"))
    assert cluster.missing() == ["no-such-program"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cluster.missing() == ["root's rights", "no-such-program"]
