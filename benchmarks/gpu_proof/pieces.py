"""Pieces of the proof, each a process of its own with a time limit, and how one ended.

A kernel can fault, hang, or take its CUDA context with it: nothing that runs kernels runs in the process that reports.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXIT_RESTART = 75  # the device was lost; the same command goes on where it ended
MAX_RESTARTS = 3
STOP_S = 5.0  # from asking a process to stop until it is killed
TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Piece:
    """One command. `record`: the file in which a pytest run notes its results."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    record: Path | None = None


@dataclass
class Outcome:
    """How a piece ended. status: passed, failed, timed out, crashed, not started."""

    name: str
    status: str
    seconds: float = 0.0
    restarts: int = 0
    output: str = ""

    @property
    def tail(self) -> str:
        """The end of its output."""
        return self.output.strip()[-TAIL_CHARACTERS:]


@dataclass
class _Running:
    piece: Piece
    process: subprocess.Popen[bytes]
    log: Path
    begin_s: float
    restarts: int = 0


def run_pieces(
    pieces: Sequence[Piece], logs: Path, parallel: int, until_s: float, say: Callable[[str], None]
) -> list[Outcome]:
    """The pieces' outcomes, in their order; at most `parallel` run at once, none beyond `until_s` (Unix time).

    A piece that no time is left for is "not started". One whose device was lost, or that was killed by a signal, is
    started again a few times: it knows where it was.
    """
    waiting, running = list(pieces), list[_Running]()
    outcomes: dict[str, Outcome] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel and time.time() < until_s:
                piece = waiting.pop(0)
                log = logs / f"{piece.name.replace(' ', '_').replace('/', '_')}.log"
                running.append(_Running(piece, _start(piece, log), log, time.time()))
            if not running:
                break
            time.sleep(0.05)
            for job in list(running):
                outcome = _poll(job, until_s)
                if outcome is not None:
                    running.remove(job)
                    outcomes[job.piece.name] = outcome
                    say(f"{outcome.name}: {outcome.status} after {outcome.seconds:.0f} s")
    finally:
        for job in running:
            _stop(job.process)
    return [outcomes.get(piece.name, Outcome(piece.name, "not started")) for piece in pieces]


def _start(piece: Piece, log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **piece.environment}
    with log.open("ab") as file:
        # A session of its own: what the piece starts ends with it.
        return subprocess.Popen(
            piece.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _poll(job: _Running, until_s: float) -> Outcome | None:
    """How the piece ended, or None while it runs (or runs again)."""
    code = job.process.poll()
    now = time.time()
    if code is None:
        if now < until_s:
            return None
        _stop(job.process)
        status = "timed out"
    elif code == EXIT_RESTART or code < 0:
        _stop(job.process)
        if job.restarts < MAX_RESTARTS and now < until_s:
            job.restarts += 1
            job.process = _start(job.piece, job.log)
            return None
        status = "crashed"
    else:
        status = "passed" if code == 0 else "failed"
    output = job.log.read_text(errors="replace") if job.log.exists() else ""
    return Outcome(job.piece.name, status, now - job.begin_s, job.restarts, output)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the piece's process group: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this interpreter."""
    return (sys.executable, *arguments)
