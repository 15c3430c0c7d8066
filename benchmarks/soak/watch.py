"""A training run on a cluster, watched by its operator: its steps, its job, and the next job where one has failed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from benchmarks.soak.account import Row
from ldm_scale.telemetry.tensorboard import METRICS_FILE
from tests.slurm.jobs import ENDED, TWO_NODES, Desk, Job

LOOK_S, ASK_S = 0.25, 1.0  # between two looks at the figures, two questions to Slurm
PLAIN_S = 60.0  # between two lines where no bar can be drawn
STUCK_S = 300.0  # without a step: it will not come back
TAIL_BYTES = 65536  # of the figures: more than a look can have missed
OPTIONS = (*TWO_NODES[:-1], "--time=1-0")
FAILED = tuple(state for state in ENDED if state != "COMPLETED")


class SoakError(RuntimeError):
    """The run did not do what it must, with the end of its log."""


class Watch:
    """One run from its submission to its end. A job that has failed is submitted again at once, by the same command."""

    def __init__(self, desk: Desk, name: str, arguments: list[str], run_dir: Path, total_images: int, faults: str):
        self.desk, self.cluster, self.run_dir, self.total_images = desk, desk.cluster, run_dir, total_images
        self.rows: list[Row] = []
        self.jobs: list[Job] = []
        self.is_over = False
        self.name, self.news = name, ""  # what the bar says beside
        self._arguments, self._env = arguments, {"LDM_FAULTS": faults} if faults else {}
        self._asked_s = self._plain_s = 0.0
        self._facts: dict[str, str] = {}
        self._submitted_s = time.time()
        self._bar = tqdm(
            total=total_images,
            desc=name,
            unit="img",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{postfix}",
        )
        self._submit()

    @property
    def job(self) -> Job:
        return self.jobs[-1]

    @property
    def attempt(self) -> tuple[str, str]:
        """The start that is under way, as Slurm said last: the job's number, and how often it came back."""
        return self.job.number, self._facts.get("Restarts", "0")

    @property
    def state(self) -> str:
        """The job's, as Slurm said last."""
        return self._facts.get("JobState", "PENDING")

    @property
    def images(self) -> int:
        """The most that were seen."""
        return max((images for _, images in self.rows), default=0)

    @property
    def log(self) -> str:
        """The logs of all its jobs."""
        return "".join(job.log for job in self.jobs)

    def look(self) -> None:
        """Nothing; waits a moment, then takes in what has happened."""
        time.sleep(LOOK_S)
        self._read_rows()
        if time.monotonic() - self._asked_s >= ASK_S:
            self._asked_s = time.monotonic()
            self._facts = self.job.facts
            if self.state in FAILED:
                self.say(f"job {self.job.number} has ended: {self.state}; the same command again")
                self._submit()
            elif self.state == "COMPLETED":
                if not (self.run_dir / "result.json").exists():
                    raise SoakError(f"job {self.job.number} has ended before the run\n{self.log[-3000:]}")
                self.is_over = True
        self._show()

    def wait(self, holds: Callable[[], bool], timeout_s: float, problem: str) -> None:
        """Returns as soon as the condition holds. Raises: SoakError when it does not within the time."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise SoakError(f"{problem} within {timeout_s:.0f} s\n{self.log[-3000:]}")
            self.look()

    def wait_for_step(self) -> None:
        """Returns after the next step, or when the run is over."""
        seen = len(self.rows)
        self.wait(lambda: self.is_over or len(self.rows) > seen, STUCK_S, "no step")

    def finish(self) -> None:
        """Returns when the run has reached its end."""
        while not self.is_over:
            self.wait_for_step()

    def wait_for_next_start(self, before: tuple[str, str], timeout_s: float) -> None:
        """Returns when the run was started once more than in `before`, an `attempt`."""
        self.wait(lambda: self.attempt != before and self.state == "RUNNING", timeout_s, "no further start")

    def say(self, text: str) -> None:
        tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def _submit(self) -> None:
        self.jobs.append(self.desk.submit("train_ldm", *self._arguments, options=OPTIONS, env=self._env))
        self._facts = {}

    def _read_rows(self) -> None:
        """Those that came since: a start that sets the run back takes rows out of the file."""
        try:
            with (self.run_dir / METRICS_FILE).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return
        last_s = self.rows[-1][0] if self.rows else self._submitted_s
        for line in lines:
            if line.startswith(b"{") and line.endswith(b"}\n"):
                row = json.loads(line)
                if row["time"] > last_s and "loss" in row:
                    self.rows.append((row["time"], row["images"]))

    def _show(self) -> None:
        left = ""
        if len(self.rows) > 1:
            (first_s, first), last_s = self.rows[0], self.rows[-1][0]
            rate = (self.images - first) / (last_s - first_s)
            left = f", {tqdm.format_interval(int((self.total_images - self.images) / max(rate, 1e-9)))} left"
        postfix = f"{left}{self.news}"
        self._bar.n = self.images
        self._bar.set_postfix_str(postfix.removeprefix(", "), refresh=False)
        self._bar.update(0)
        if self._bar.disable and time.monotonic() - self._plain_s >= PLAIN_S:
            self._plain_s = time.monotonic()
            self.say(f"{self.name} {self.images}/{self.total_images} img{postfix}")
