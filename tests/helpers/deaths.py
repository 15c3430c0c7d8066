"""A run as a launcher starts it, killed in part or as a whole, and what is left of it on the machine."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

import ldm_scale
from ldm_scale.__main__ import run_command
from ldm_scale.engine.run_lock import LOCK
from ldm_scale.processes import end_with_parent
from ldm_scale.train import main
from tests.helpers.ranks import import_before_fork

ROOT = Path(ldm_scale.__file__).parents[1]
RANKS = 2
KINDS = ("launcher", "rank", "loader", "group")
GONE_S = 15.0  # in which everything has to have ended after a kill; torch looks after its processes every 5 s
_MARK = "LDM_TEST_OF_DEATHS"
_CHOICE_S = 30.0  # that a process which is to be killed may take to be there


class Start:
    """One start of the run: launcher, ranks, their loader processes.

    The launcher is torchrun, or else a fork of this process that does the same: the ranks need nothing to be imported.
    `temporary` is their folder for temporary files.
    """

    def __init__(self, arguments: list[str], temporary: Path, port: int, torchrun: bool = False) -> None:
        self._run_dir = Path(next(text for text in arguments if text.startswith("run_dir=")).partition("=")[2])
        self._log = self._run_dir.with_suffix(".log")
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._known: dict[int, psutil.Process] = {}
        self._status: int | None = None
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
        environment |= {_MARK: self._mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        self._log.write_text("")
        self._started_s = time.time()
        if torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
            command += [f"--master-port={port}", "ldm_scale/train.py", *arguments]
            with self._log.open("w") as log:
                self.pid = subprocess.Popen(
                    command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
                ).pid
            return
        import_training()
        sys.stdout.flush()
        self._started_s = time.time()
        parent, self.pid = os.getpid(), os.fork()
        if not self.pid:
            exit_with(lambda: _launch(parent, arguments, environment, self._log, port))

    @property
    def output(self) -> str:
        """What all of its processes have said."""
        return self._log.read_text(errors="replace")

    @property
    def status(self) -> int | None:
        """The launcher's exit status, negative for a signal; None while it lives."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait_for_steps(self, number: int) -> float:
        """Seconds from the start to the end of its first step; returns after so many steps, or when the run ends."""
        given_up = time.monotonic() + 120
        while len(ended := self._steps()) < number and self.status is None:
            assert time.monotonic() < given_up, f"no step:\n{self.output}"
            time.sleep(0.02)
        return ended[0] - self._started_s if ended else 0.0

    def _steps(self) -> list[float]:
        """When steps of this start ended."""
        path = self._run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        times = [float(json.loads(line)["time"]) for line in lines]
        return [time_s for time_s in times if time_s > self._started_s]

    def kill(self, kind: str, choice: random.Random) -> bool:
        """Whether a process of the kind could be killed (False: the run had ended before there was one)."""
        given_up = time.monotonic() + _CHOICE_S
        while self.status is None:
            self.processes()  # those of now are known from here on
            victims = self._victims(kind)
            if victims:
                for victim in victims if kind == "group" else [choice.choice(victims)]:
                    with suppress(psutil.NoSuchProcess):
                        victim.kill()
                return True
            assert time.monotonic() < given_up, f"no {kind} to kill:\n{self.output}"
            time.sleep(0.01)
        return False

    def _victims(self, kind: str) -> list[psutil.Process]:
        try:
            launcher = psutil.Process(self.pid)
            ranks = launcher.children()
            if kind == "group":
                return [launcher, *launcher.children(recursive=True)]
            if kind == "loader":
                # A rank has other children, too, while it starts: compilers and linkers that libraries look for.
                return [child for rank in ranks for child in rank.children() if child.name() == "pt_data_worker"]
            return [launcher] if kind == "launcher" else ranks
        except psutil.NoSuchProcess:
            return []

    def processes(self) -> list[psutil.Process]:
        """Those of the start that live, whoever their parents are now."""
        for process in psutil.process_iter():
            if process.pid not in self._known and self._is_ours(process.pid):
                self._known[process.pid] = process
        return [process for process in self._known.values() if _is_alive(process)]

    def _is_ours(self, pid: int) -> bool:
        try:
            if os.getsid(pid) == self.pid:
                return True
            return f"{_MARK}={self._mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def wait_until_gone(self) -> float:
        """Seconds until nothing of it lived.

        Raises: AssertionError if something does not end; it is killed then.
        """
        began = time.monotonic()
        while left := self.processes():
            if time.monotonic() - began > GONE_S:
                told = [f"{process.pid} {process.status()} {process.cmdline()}" for process in left]
                for process in left:
                    process.kill()
                raise AssertionError(f"still there after {GONE_S} s: {told}\n{self.output}")
            _ = self.status
            time.sleep(0.02)
        assert self.status is not None
        return time.monotonic() - began

    def pids(self) -> set[int]:
        """The numbers of all that were seen."""
        return {self.pid, *self._known}


@contextmanager
def ended(start: Start) -> Iterator[Start]:
    """The start; what is left of it after the block is killed."""
    try:
        yield start
    finally:
        for process in start.processes():
            process.kill()
        start.wait_until_gone()


def wait_to_end(start: Start, timeout_s: float = 240.0) -> int:
    """The launcher's exit status."""
    given_up = time.monotonic() + timeout_s
    while start.status is None:
        assert time.monotonic() < given_up, start.output
        time.sleep(0.05)
    return start.status


def import_training() -> None:
    """Nothing; what a training imports is there in this process and its forks."""
    import_before_fork()
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import ldm_scale.operations.train
    import ldm_scale.training.autoencoder_step
    import ldm_scale.training.trainer  # noqa: F401


def is_locked(run_dir: Path) -> bool:
    """Whether some process holds the run's lock."""
    if not (run_dir / LOCK).exists():
        return False
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def port_for_rank_0(choice: random.Random) -> int:
    """A free port that the kernel does not give to outgoing connections, as a job script chooses one."""
    return next(port for port in iter(lambda: choice.randrange(20000, 32000), 0) if can_listen(port))


def can_listen(port: int) -> bool:
    """Whether a server can be started at the port, as ours is."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def shared_memory_of(pids: set[int]) -> list[str]:
    """Names in /dev/shm that some of these processes have given."""
    names = [path.name for path in Path("/dev/shm").iterdir()]
    return [name for name in names if {int(n) for n in "".join(c if c.isdigit() else " " for c in name).split()} & pids]


def _is_alive(process: psutil.Process) -> bool:
    try:
        if not process.is_running():
            return False
        # Its files are closed when the last of its threads has ended, and the first may be the first to end.
        return process.status() != psutil.STATUS_ZOMBIE or len(os.listdir(f"/proc/{process.pid}/task")) > 1
    except (psutil.NoSuchProcess, OSError):
        return False


def exit_with(work: Callable[[], int]) -> None:
    """Does not return: this is a fork, and what the parent would do next is not to be done."""
    status = 1
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _launch(parent: int, arguments: list[str], environment: dict[str, str], log: Path, port: int) -> int:
    """The status of the first rank that failed, whereupon the others were ended; 0 if none did."""
    end_with_parent(parent)
    os.setsid()
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.clear()
    os.environ |= environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "TORCHELASTIC_RUN_ID": "none",
    }
    tempfile.tempdir = None
    ranks = []
    for rank in range(RANKS):
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            exit_with(lambda: run_command(main, arguments))
        ranks.append(pid)
    living, failed = set(ranks), 0
    while living:
        pid, status = os.waitpid(-1, 0)
        living.discard(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status) % 256
            for other in living:
                os.kill(other, signal.SIGTERM)
    return failed
