"""Jobs as a person submits them on a test cluster: from a fresh copy of the repository, with tiny experiments."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

import ldm_scale
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.rank_files import images_of, read_manifest
from tests.slurm.cluster import Cluster, ClusterError

ROOT = Path(ldm_scale.__file__).parents[1]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
# A start takes fifteen seconds on two idle cores, most of it importing, and minutes on busy ones.
START_S = 600.0
# One rank on each of two nodes. Signals well before the limit, so that a test's own comes first.
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30")
# Makes steps long enough for a signal to come between two of them.
SLOW = "sleep:at=step.forward,times=1000000,seconds={seconds}"
# What is compared: enough steps to be disturbed some times.
IMAGES = ("train.total_images=320", "train.checkpoint_every_images=16")
# Daemons begin sessions of their own; jobs are to give way to others as whoever started the tests does.
SETTINGS = """\
python=(sh -c 'echo {niceness} > /proc/self/autogroup; exec "$0" "$@"' .venv/bin/python)
"""


def fresh_clone(folder: Path) -> Path:
    """A copy of the files that git tracks or would, with this environment as its .venv."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    niceness = re.search(r"nice (-?\d+)", _text(Path("/proc/self/autogroup")))
    if niceness and int(niceness[1]):
        (folder / "slurm" / "settings.sh").write_text(SETTINGS.format(niceness=niceness[1]))
    return folder


@dataclass
class Job:
    """A job that was submitted, by its number."""

    cluster: Cluster
    number: str
    log_path: Path
    run_dir: Path | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What Slurm says of it."""
        words = self.cluster.run("scontrol", "show", "job", self.number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def starts(self) -> int:
        """How often it was started, so far."""
        return int(self.facts["Restarts"]) + 1

    @property
    def log(self) -> str:
        return _text(self.log_path)

    @property
    def images(self) -> int:
        """Those of the newest checkpoint."""
        assert self.run_dir is not None
        newest = latest_checkpoint(self.run_dir / "checkpoints")
        return 0 if newest is None else images_of(newest)

    @property
    def nodes(self) -> list[str]:
        """The nodes that it has, in order; not for more than nine."""
        found = re.fullmatch(r"n\[?([\d,-]+)\]?", self.facts["NodeList"])
        assert found, self.facts
        ranges = [part.split("-") for part in found[1].split(",")]
        return [f"n{number}" for part in ranges for number in range(int(part[0]), int(part[-1]) + 1)]

    def rank_process(self, node: str) -> int:
        """The training process of the job's rank on that node."""
        # Loader workers are forked, and so look the same: the oldest is their parent.
        return min(self.cluster.pids(node, ".venv/bin/python ldm_scale/train.py"))

    def signal(self, name: str) -> None:
        """Nothing; all ranks get the signal from Slurm."""
        self.cluster.run("scancel", f"--signal={name}", self.number)

    def cancel(self) -> None:
        self.cluster.run("scancel", self.number)

    def wait_for_images(self, images: int, starts: int = 1) -> None:
        """Returns when a checkpoint of so many images is there, and the job runs for the so-many-th time."""
        self._wait(lambda: self.images >= images and self.starts >= starts, f"no checkpoint of {images} images")

    def wait_for_state(self, *states: str) -> None:
        self._wait(lambda: self.state in states, f"not {' or '.join(states)}")

    def wait_for_start(self, starts: int) -> None:
        """Returns when it runs for the so-many-th time."""
        self._wait(lambda: self.starts >= starts and self.state == "RUNNING", f"start {starts} did not come")

    def wait_for_end(self, state: str = "COMPLETED", timeout_s: float = START_S) -> None:
        """Returns when it has ended in that state and no longer."""
        self._wait(lambda: self.state in ENDED, "did not end", timeout_s)
        assert self.state == state, f"{self.facts}\n{self.log}"

    def _wait(self, holds: Callable[[], bool], problem: str, timeout_s: float = START_S) -> None:
        def holds_or_over() -> bool:
            return holds() or self.state in ENDED

        try:
            self.cluster.wait_for(holds_or_over, timeout_s, f"job {self.number}: {problem}")
        except ClusterError as error:
            raise AssertionError(f"{error}\n--- {self.log_path}\n{self.log}") from None
        assert holds(), f"job {self.number} {self.state}: {problem}\n{self.log}"


class Desk:
    """Where jobs are submitted: the root of a clone."""

    def __init__(self, cluster: Cluster, clone: Path) -> None:
        self.cluster, self.clone = cluster, clone

    def submit(
        self,
        script: str,
        *arguments: str,
        options: tuple[str, ...] = TWO_NODES,
        slow_s: float = 0.0,
        env: dict[str, str] | None = None,
    ) -> Job:
        """The job of `sbatch slurm/SCRIPT.sh ARGUMENTS`; its steps take `slow_s` longer."""
        variables = {"LDM_FAULTS": SLOW.format(seconds=slow_s)} if slow_s else {}
        command = ("sbatch", "--parsable", *options, f"slurm/{script}.sh", *arguments)
        number = self.cluster.run(*command, cwd=self.clone, env=variables | (env or {})).strip()
        run_dirs = [Path(argument.partition("=")[2]) for argument in arguments if argument.startswith("run_dir=")]
        log = self.clone / "slurm" / "logs" / f"{script}-{number}.out"
        return Job(self.cluster, number, log, run_dirs[-1] if run_dirs else None)


def digest(run_dir: Path) -> str:
    """One number for every tensor of the newest checkpoint: weights, moments, averages, of all ranks."""
    newest = latest_checkpoint(run_dir / "checkpoints")
    assert newest is not None, run_dir
    total = hashlib.sha256(newest.name.encode())
    for path in sorted(newest.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                total.update(f"{path.name} {name}".encode() + file.get_tensor(name).numpy().tobytes())
    return total.hexdigest()


def gradient_bytes(run_dir: Path) -> int:
    """Of all that the newest checkpoint's networks train, in fp32."""
    newest = latest_checkpoint(run_dir / "checkpoints")
    assert newest is not None, run_dir
    models = read_manifest(newest)["models"].values()
    return sum(4 * math.prod(tensor["shape"]) for model in models for tensor in model["tensors"]["weight"].values())


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
