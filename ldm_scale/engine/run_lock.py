"""One run per run directory: a second one would take back the first one's figures and remove its checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ldm_scale.engine.collectives import broadcast_object
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry.side_files import side_write

LOCK = ".lock"


class RunLock:
    """Holds a run directory for one run; a context manager. Collective: all ranks enter it.

    The kernel's lock ends with rank 0's process, so nothing stale is left by a kill. It is a record lock and not flock,
    which forked loader processes would hold on to for a while after their parent was killed.
    Raises: ConfigError on all ranks if the directory cannot be made or locked, or another run holds it.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._run_dir, self._rank = run_dir, rank
        self._file: BinaryIO | None = None

    def __enter__(self) -> RunLock:
        problem = broadcast_object(self._take() if self._rank == 0 else "")
        if problem:
            raise ConfigError(problem)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _take(self) -> str:
        """What prevents the run, or "" if the lock is ours."""
        path = self._run_dir / LOCK
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            return (
                f"run_dir={self._run_dir} cannot be written ({error.strerror}: {error.filename}); free space there or "
                "fix its permissions, or give another run_dir"
            )
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # what POSIX has for a lock that another one holds
                return (
                    f"{path} cannot be locked ({error.strerror}), and without a lock two runs in run_dir="
                    f"{self._run_dir} would spoil each other's files; switch locks on there (a file system may have to "
                    "be mounted with them), or give a run_dir on another file system"
                )
            self._file.seek(0)
            holder = self._file.read().decode(errors="replace").strip() or "unknown"
            return f"run_dir={self._run_dir} is in use by another run ({holder}); wait for it, or give another run_dir"
        job = os.environ.get("SLURM_JOB_ID")
        holder = f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}\n"
        with side_write(path):  # only a text for those that come later: the lock is the kernel's
            self._file.truncate(0)
            self._file.write(holder.encode())
        return ""
