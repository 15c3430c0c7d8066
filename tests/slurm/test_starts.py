"""Starts that cannot succeed end with what is wrong, within seconds; and not for ever in a circle."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ldm_scale.engine.restarts import MAX_WITHOUT_PROGRESS, STARTS
from tests.helpers.commands import stage2
from tests.slurm.jobs import TWO_NODES, Desk, Job

pytestmark = pytest.mark.timeout(3600)
ONE_NODE = ("--nodes=1", *TWO_NODES[1:])
WAIT_S = 8
TOLD_S = 20.0  # from then on to the end of the job, on a busy machine
PORT = 23456
LISTEN = f"""import socket, time
server = socket.create_server(('10.77.0.11', {PORT}))
print('listens', flush=True)
time.sleep(600)"""


@contextmanager
def _each_rank(clone: Path, adds: str) -> Iterator[None]:
    """Ranks get a further argument, words of a shell that may name their number."""
    settings = clone / "slurm" / "settings.sh"
    before = settings.read_text() if settings.exists() else "python=(.venv/bin/python)\n"
    settings.write_text(before + f"""python=(sh -c 'exec "$@" {adds}' rank "${{python[@]}}")\n""")
    try:
        yield
    finally:
        settings.write_text(before)


def _wait_for_log(job: Job, words: str) -> None:
    job.cluster.wait_for(lambda: words in job.log, 600, f"not in the log: {words}\n{job.log}")


def test_a_job_that_gets_nowhere_stops_for_good(desk: Desk, inputs: Path, tmp_path: Path) -> None:
    """Its first step hangs each time, and is ended by the watchdog."""
    budgets = ("watchdog.step_s=1", "watchdog.other_s=20")
    arguments = stage2(inputs, tmp_path / "run", *budgets)
    job = desk.submit("train_ldm", *arguments, options=ONE_NODE, slow_s=600)
    job.wait_for_end("FAILED", timeout_s=1500)
    assert job.starts == 2 + MAX_WITHOUT_PROGRESS, job.log
    assert job.log.count("its ranks stopped to be started again; it is requeued") == 1 + MAX_WITHOUT_PROGRESS
    number = MAX_WITHOUT_PROGRESS + 1
    assert f"the job came back {number} times in a row without a new checkpoint and stops for good" in job.log
    time.sleep(8)  # longer than a requeued job waits here
    assert job.state == "FAILED"


def test_a_node_that_does_not_come_is_named(desk: Desk, inputs: Path, tmp_path: Path) -> None:
    arguments = stage2(inputs, tmp_path / "run", f"watchdog.rendezvous_s={WAIT_S}")
    job = desk.submit("train_ldm", *arguments)
    job.wait_for_state("RUNNING")
    first, missing = job.nodes
    port = f"{20000 + int(job.number) % 12000:04X}"
    desk.cluster.wait_for(lambda: len(desk.cluster.pids(missing, ".venv/bin/python")) == 1, 60, "no rank")
    desk.cluster.set_link(missing, up=False)
    try:
        table = f"nsenter --net=/run/netns/{first} cat /proc/net/tcp"
        desk.cluster.wait_for(lambda: f":{port} 00000000:0000 0A" in desk.cluster.shell(table), 600, job.log)
        listens_at = time.monotonic()
        _wait_for_log(job, "have not come")
        assert time.monotonic() - listens_at < WAIT_S + 5
        told = f"1 of 2 ranks have not come within {WAIT_S} s: rank(s) 1; those that came run on {first}."
        assert told in job.log, job.log
    finally:
        desk.cluster.set_link(missing, up=True)
    job.wait_for_end("FAILED")


def test_a_port_that_is_taken_is_named(desk: Desk, inputs: Path, tmp_path: Path) -> None:
    listener = (f'--wrap={desk.clone}/.venv/bin/python -c "{LISTEN}"', "--nodelist=n1", f"--output={tmp_path}/other")
    desk.cluster.run("sbatch", *listener)
    other = tmp_path / "other"
    desk.cluster.wait_for(lambda: other.exists() and "listens" in other.read_text(), 60, "nobody listens")
    arguments = stage2(inputs, tmp_path / "run", "watchdog.rendezvous_s=3000")
    job = desk.submit("train_ldm", *arguments, options=(*TWO_NODES, "--nodelist=n1,n2"), env={"MASTER_PORT": str(PORT)})
    _wait_for_log(job, "error: ")
    assert f"0: error: port {PORT} of 10.77.0.11 (10.77.0.11) is taken by another process" in job.log
    job.wait_for_end("FAILED", timeout_s=TOLD_S)


def test_ranks_that_differ_are_named(desk: Desk, inputs: Path, tmp_path: Path) -> None:
    with _each_rank(desk.clone, "train.seed=$((7 + SLURM_PROCID))"):
        job = desk.submit("train_ldm", *stage2(inputs, tmp_path / "run", "watchdog.rendezvous_s=3000"))
        _wait_for_log(job, "error: ")
        job.wait_for_end("FAILED", timeout_s=TOLD_S)
    told = (
        r"[01]: error: the ranks were not started alike: train.seed is 8 on rank\(s\) 1 \(n2\) and 7 on rank 0 \(n1\)\."
    )
    assert len(re.findall(told, job.log)) == 2, job.log
    assert [path.name for path in (tmp_path / "run").iterdir()] == [STARTS]
