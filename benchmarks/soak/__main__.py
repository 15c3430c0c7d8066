"""A run on a real Slurm for two hours, a fault every ten minutes: what is lost, and whether its weights are right.

    make soak          two hours of training, each of 12 kinds of faults once, and what they take
    make soak-short    the five cheapest kinds, ten minutes in all

The cluster has three nodes in namespaces, of which the run, of stage 2, has two with a rank on each. Its steps are
tiny and slowed down to SLOW_S seconds. Afterwards the same images are trained once more, undisturbed and at full speed,
with the step skipped that the first run had to skip: all weights, moments and averages must be equal to the last bit.
Exit status 0 if they are, every fault was survived as it should be and took at most MAX_LOST_S, and the training time
was effective enough.

Needs root. Ctrl-C ends it and leaves a report of what there is, under another name.
"""

from __future__ import annotations

import argparse
import fcntl
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import environment
from benchmarks.soak import summary
from benchmarks.soak.kinds import KINDS, SHORT, Kind, Orders
from benchmarks.soak.watch import SoakError, Watch
from ldm_scale.training.skipping import read_records
from tests.helpers.commands import stage2
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_dataset
from tests.slurm.cluster import Cluster, ClusterError, missing
from tests.slurm.jobs import Desk, digest, fresh_clone

ROOT = Path(__file__).resolve().parents[2]
BATCH, SLOW_S = 8, 2.0
NODES, DEAD_AFTER_S = 3, 5
MINUTES, SHORT_MINUTES = 120.0, 6.0
# A node that is lost takes 35 s of Slurm's time, a hang up to step_s + other_s: what is made again has to be little.
CONFIGURATION = (
    f"train.global_batch={BATCH}",
    f"train.log_every_images={BATCH}",
    "train.checkpoint_every_images=0",
    "train.checkpoint_every_s=10",
    "train.validate_every_images=0",
    "train.sample_every_images=0",
    "watchdog.step_s=8",
    "watchdog.other_s=20",
)


def main(argv: Sequence[str]) -> int:
    """0 if the run was worth its time and ended with the right weights, 1 if not, 2 where no cluster can be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help=f"{len(SHORT)} kinds of faults in {SHORT_MINUTES:g} minutes"
    )
    parser.add_argument("--minutes", type=float, help=f"of training, what is lost not counted ({MINUTES:g})")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder of the report")
    parser.add_argument("--keep", action="store_true", help="keep logs and run folders, as after a failure")
    arguments = parser.parse_args(argv)
    if lacking := missing():
        print(f"error: no Slurm cluster without {', '.join(lacking)}; run `make soak` as root", file=sys.stderr)
        return 2
    names = arguments.kind or (SHORT if arguments.short else [kind.name for kind in KINDS])
    kinds = [kind for kind in KINDS if kind.name in names]
    minutes = arguments.minutes or (SHORT_MINUTES if arguments.short else MINUTES)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    found = summary.Found(minutes=minutes, kinds=len(kinds))
    try:
        soak(folder, kinds, minutes, found)
    except KeyboardInterrupt:
        found.problem = "ended by Ctrl-C"
    except (SoakError, ClusterError, AssertionError) as error:
        found.problem = str(error)
    failures = summary.failures(found)
    name = "soak-short" if arguments.short else "soak"
    name += "-unfinished" if found.problem else ""
    summary.write(arguments.out, name, found, environment_of(found))
    print((arguments.out / f"{name}.md").read_text())
    if failures or arguments.keep:
        print(f"logs and run folders: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return 1 if failures else 0


def soak(folder: Path, kinds: Sequence[Kind], minutes: float, found: summary.Found) -> None:
    """Nothing; the disturbed run, then the undisturbed one, with all that is found put into `found`.

    Raises: SoakError, ClusterError if it cannot go on.
    """
    make_dataset(folder / "data", num_samples=24, samples_per_shard=4, resolution=20)
    tiny_artifact(folder / "artifact")
    total_images = BATCH * max(2 * len(kinds), round(60 * minutes / SLOW_S))
    with Cluster(folder / "cluster", nodes=NODES, dead_after_s=DEAD_AFTER_S) as cluster:
        desk = Desk(cluster, fresh_clone(folder / "clone"))
        orders = Orders(folder / "faults", SLOW_S)
        run_dir = folder / "disturbed"
        watch = Watch(desk, "soak", _arguments(folder, run_dir, total_images), run_dir, total_images, str(orders.path))
        found.rows = watch.rows
        try:
            _disturb(watch, orders, kinds, 60 * minutes / len(kinds), found)
            watch.news = ""
            watch.finish()
        finally:
            watch.close()
            skipped = read_records(run_dir)
            found.skipped_images = BATCH * len(skipped)
        watch.say("the run is over; what it left is looked for")
        found.checks["nothing is left"] = "; ".join(leftovers(watch))
        found.disturbed = digest(run_dir)
        found.undisturbed = _undisturbed(desk, folder, total_images, skipped, found)


def _disturb(watch: Watch, orders: Orders, kinds: Sequence[Kind], every_s: float, found: summary.Found) -> None:
    """Nothing; the faults have come, each in the middle of its part of the time, and later if the run is not back."""
    watch.wait(lambda: watch.job.images > 0, 300, "no first checkpoint")
    for number, kind in enumerate(kinds):
        due_s = watch.rows[0][0] + (number + 0.5) * every_s
        while time.time() < due_s and not watch.is_over:
            watch.news = f"; {kind.name} in {max(0, due_s - time.time()) / 60:.1f} min"
            watch.wait_for_step()
        if watch.is_over:
            raise SoakError(f"the run was over before the fault {kind.name!r}; give it more --minutes")
        fault = summary.Fault(kind.name, kind.what, time.time(), watch.images)
        found.faults.append(fault)
        watch.say(f"fault {number + 1} of {len(kinds)}, at {watch.images} images: {kind.what}")
        watch.news = f"; {kind.name}"
        jobs, starts, said = len(watch.jobs), watch.log.count("(start "), len(watch.log)
        kind.act(watch, orders)
        seen = watch.images
        watch.wait(lambda seen=seen: watch.is_over or watch.job.images > seen, 300, "no new checkpoint")  # type: ignore[misc]
        lines = [line for line in watch.log[said:].splitlines() if re.search(kind.says, line)]
        fault.said = lines[0].strip().replace(f"{watch.run_dir.parent}/", "") if lines else ""
        fault.starts, fault.jobs = watch.log.count("(start ") - starts, len(watch.jobs) - jobs
        if not lines:
            fault.problem = f"nothing in the log says {kind.says!r}"
        elif (fault.jobs > 0) == kind.by_itself:
            fault.problem = "submitted again by hand" if kind.by_itself else "not submitted again"
        watch.say(f"training goes on at {watch.images} images{f', but: {fault.problem}' if fault.problem else ''}")


def _undisturbed(
    desk: Desk, folder: Path, total_images: int, skipped: list[dict[str, Any]], found: summary.Found
) -> str:
    """The digest of the same images' run in which nothing happens but the same skipped step, if there was one."""
    rules = [f"nan:at=step.input,rank=1,nth={record['images'][0] // BATCH + 1}" for record in skipped]
    run_dir = folder / "undisturbed"
    arguments = _arguments(folder, run_dir, total_images)
    watch = Watch(desk, "undisturbed", arguments, run_dir, total_images, "; ".join(rules))
    try:
        watch.finish()
    finally:
        watch.close()
    same = [[r["images"] for r in records] for records in (skipped, read_records(run_dir))]
    found.checks["the same steps are skipped"] = "" if same[0] == same[1] else f"{same[0]} and {same[1]}"
    return digest(run_dir)


def leftovers(watch: Watch) -> list[str]:
    """What a run that is over must not leave: processes, shared memory, locks, temporary files."""
    cluster, left = watch.cluster, []

    def processes() -> list[str]:
        daemons = {name: cluster.pids(name, "slurmd -N") for name in cluster.addresses}
        return [
            f"process {pid} on {name}" for name in daemons for pid in cluster.pids(name) if pid not in daemons[name]
        ]

    try:
        watch.wait(lambda: not processes(), 30, "")
    except SoakError:
        left += processes()
    left += [f"/dev/shm/{name}" for name in cluster.run("ls", "-A", "/dev/shm").split()]
    left += [str(path) for path in (watch.run_dir / "checkpoints").glob(".*")]
    left += [str(path) for path in (watch.desk.clone / "slurm" / "logs").glob(".restart-*")]
    with (watch.run_dir / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            left.append("the run folder's lock")
    return left


def environment_of(found: summary.Found) -> dict[str, Any]:
    """What it ran on and how."""
    import torch

    date = time.strftime("%Y-%m-%d", time.gmtime())
    settings = {"nodes": NODES, "dead_after_s": DEAD_AFTER_S, "ranks": 2, "slow_s": SLOW_S, "batch": BATCH}
    return environment(torch.device("cpu"), date) | {
        "settings": settings | {"minutes": found.minutes, "configuration": CONFIGURATION}
    }


def _arguments(folder: Path, run_dir: Path, total_images: int) -> list[str]:
    return stage2(folder, run_dir, *CONFIGURATION, f"train.total_images={total_images}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
