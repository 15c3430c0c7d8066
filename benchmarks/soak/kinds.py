"""The kinds of faults: what is done to the run from outside, and what it must say of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.watch import Watch
from ldm_scale.engine.checkpoint import latest_checkpoint
from tests.slurm.jobs import SLOW

BACK_S = 300.0  # after which a run that has not come back will not
RANK = ".venv/bin/python ldm_scale/train.py"


@dataclass(frozen=True)
class Kind:
    """One kind of fault. `act` returns when its effect is there; `says` is in the log then, or soon."""

    name: str
    what: str
    act: Callable[[Watch, Orders], None]
    says: str  # a regular expression
    by_itself: bool = True  # False: Slurm lets the job end, and the operator submits the same command again


class Orders:
    """The file of LDM_FAULTS: steps that are slow enough to be disturbed, and at times one fault more."""

    def __init__(self, path: Path, slow_s: float) -> None:
        self.path = path
        self._slow = SLOW.format(seconds=slow_s)
        self.give("")

    def give(self, rule: str) -> None:
        """Nothing; this rule holds from now on, and no other."""
        written = self.path.with_suffix(".new")
        written.write_text(f"{self._slow}; {rule}\n")
        os.replace(written, self.path)


def _coming_back(disturb: Callable[[Watch], None]) -> Callable[[Watch, Orders], None]:
    def act(watch: Watch, orders: Orders) -> None:
        before = watch.attempt
        disturb(watch)
        watch.wait_for_next_start(before, BACK_S)

    return act


def _warn(watch: Watch) -> None:
    watch.job.signal("USR1")


def _preempt(watch: Watch) -> None:
    nodes = len(watch.cluster.addresses)
    options = ("--partition=urgent", f"--nodes={nodes}", "--exclusive", "--output=/dev/null")
    watch.cluster.run("sbatch", *options, "--wrap=sleep 1")


def _reach_time_limit(watch: Watch, orders: Orders) -> None:
    """Less than the notice of --signal is left, which comes at once then."""
    before = watch.attempt
    hours, minutes, _ = watch.job.facts["RunTime"].rpartition("-")[2].split(":")
    watch.cluster.run(
        "scontrol", "update", f"JobId={watch.job.number}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}"
    )
    # Before the next start: with so little time it would be warned at once again.
    watch.wait(lambda: watch.attempt != before, BACK_S, "no warning")
    watch.cluster.run("scontrol", "update", f"JobId={watch.job.number}", "TimeLimit=1-0")
    watch.wait_for_next_start(before, BACK_S)


def _lose_node(watch: Watch, orders: Orders) -> None:
    """The first one, with the job's script and rank 0."""
    before, lost = watch.attempt, watch.job.nodes[0]
    watch.cluster.kill_node(lost)
    watch.wait_for_next_start(before, BACK_S)
    watch.cluster.start_node(lost)


def _cut_link(watch: Watch, orders: Orders) -> None:
    before, cut = watch.attempt, watch.job.nodes[-1]
    watch.cluster.set_link(cut, up=False)
    try:
        watch.wait_for_next_start(before, BACK_S)
    finally:
        watch.cluster.set_link(cut, up=True)


def _kill_rank(watch: Watch) -> None:
    watch.cluster.kill(watch.job.rank_process(watch.job.nodes[-1]), "KILL")


def _stop_rank(watch: Watch) -> None:
    watch.cluster.kill(watch.job.rank_process(watch.job.nodes[-1]), "STOP")


def _stop_loader(watch: Watch) -> None:
    # Forked by the rank, and so of the same command line.
    watch.cluster.kill(max(watch.cluster.pids(watch.job.nodes[-1], RANK)), "STOP")


def _damage(watch: Watch, orders: Orders) -> None:
    """Between the save of the job that goes and the start of the one that comes."""
    before, number = watch.attempt, watch.job.number
    watch.cluster.run("scontrol", "requeuehold", number)
    watch.wait(lambda: watch.state in ("PENDING", "REQUEUE_HOLD"), BACK_S, "the job did not go")
    newest = latest_checkpoint(watch.run_dir / "checkpoints")
    assert newest is not None, "faults come after the first checkpoint"
    with (newest / "rank-00000.safetensors").open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    watch.cluster.run("scontrol", "release", number)
    watch.wait_for_next_start(before, BACK_S)


def _order(rule: str, says: str) -> Callable[[Watch, Orders], None]:
    """Within the process, while training goes on."""

    def act(watch: Watch, orders: Orders) -> None:
        told = watch.log.count(says)
        orders.give(rule)
        watch.wait(lambda: watch.log.count(says) > told, BACK_S, f"no {says!r} in the log")
        orders.give("")

    return act


def _kill_in_save(watch: Watch, orders: Orders) -> None:
    before = watch.attempt
    orders.give("kill:at=save.rename,rank=0")
    watch.wait(lambda: watch.attempt[0] != before[0], BACK_S, "no kill")
    orders.give("")
    watch.wait_for_next_start(before, BACK_S)


NOT_FINITE, DISK_FULL = "is skipped: not finite", "No space left on device"
ENDED = "the ranks ended with status"  # 137, or that of the other rank, which srun ended or which lost its peer
KINDS = (
    Kind("warning", "scancel --signal=USR1", _coming_back(_warn), "stopped by SIGUSR1 at"),
    Kind("not finite", "NaN in a batch of rank 1", _order("nan:at=step.input,rank=1", NOT_FINITE), NOT_FINITE),
    Kind("disk full", "ENOSPC in a save", _order("enospc:at=save.write,rank=0", DISK_FULL), DISK_FULL),
    Kind("damage", "scontrol requeue, and a bit of the newest checkpoint flips", _damage, "DAMAGED CHECKPOINT"),
    Kind("killed rank", "kill -9 of rank 1", _coming_back(_kill_rank), ENDED, by_itself=False),
    Kind("preemption", "a job of a higher partition takes all nodes", _coming_back(_preempt), "stopped by SIG"),
    Kind("time limit", "the job's time is over", _reach_time_limit, "stopped by SIGUSR1 at"),
    Kind("lost node", "every process of the first node is killed, slurmd too", _lose_node, "continuing at"),
    Kind("stopped rank", "SIGSTOP of rank 1", _coming_back(_stop_rank), r"hang: culprit: rank 1 "),
    Kind("cut link", "the last node's link goes down", _cut_link, "hang: culprit|NODE FAILURE"),
    Kind("stopped loader", "SIGSTOP of a loader process of rank 1", _coming_back(_stop_loader), "is stopped"),
    Kind("kill in a save", "kill -9 of rank 0 before the rename", _kill_in_save, ENDED, by_itself=False),
)
SHORT = ("warning", "not finite", "disk full", "damage", "killed rank")
