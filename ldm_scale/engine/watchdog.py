"""Ends a run that makes no progress, and says which rank is the culprit and in which phase.

A thread of every rank looks at what the rank is at (engine/phases.py). A phase over its time makes it report: where it
stands, with the stacks of all threads, in a file of run_dir/hangs (engine/hangs.py). The ranks that wait for a stuck
one run out of time with it, or see that others report, so each writes its own file; one that is stopped, or whose node
is gone, writes none. After a grace the lowest rank that has reported writes the verdict, and every live rank leaves
with the status that asks to be started again. Nothing here is a collective: they may be what hangs.

Whatever holds Python's lock keeps this thread from running. The interpreter's own watchdog (faulthandler), which needs
no lock, then writes the stacks to stderr; it ends the process, with status 1, only where no other rank does so for it,
because it cannot tell a job that was suspended. Files are touched by a thread of their own, because a file system may
be what hangs; where they cannot be written, stderr has the stacks.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

from ldm_scale.config.schema import WatchdogConfig
from ldm_scale.engine import collectives, hangs, network
from ldm_scale.engine.phases import FIRST, STEP, Phases, current
from ldm_scale.engine.rendezvous import Meeting
from ldm_scale.errors import Restart
from ldm_scale.telemetry import stacks

GRACE_S = 4.0  # that all ranks have for their reports, from the first one's on
_VERDICT_S = 1.5  # that the others leave to the rank which writes the verdict
_BACKSTOP_S = 8.0  # after which a thread that cannot run, or cannot write, is given up
_LONGEST_TICK_S = 1.0
_SUSPENDED_S = 5.0  # a tick that took longer was none of the run's: the whole job was stopped, and goes on
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


class Watchdog:
    """Watches this rank while the block lasts; a context manager."""

    def __init__(
        self, config: WatchdogConfig, run_dir: Path, rank: int, meeting: Meeting, phases: Phases = current
    ) -> None:
        self._config, self._rank, self._meeting, self._phases = config, rank, meeting, phases
        self._folder = run_dir / hangs.FOLDER / time.strftime("%Y%m%d-%H%M%S", time.gmtime(meeting.started_s))
        budgets = [budget for budget in (config.step_s, config.other_s) if budget > 0]
        self._least_s = min(budgets, default=0.0)
        self._tick_s = min(_LONGEST_TICK_S, self._least_s / 10)
        self._is_alone = len(meeting.places) == 1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._phases.enter("start")
        if self._least_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._least_s > 0:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def budget_s(self) -> float:
        """Seconds that the present phase may take; 0 if it is not watched."""
        config, phases = self._config, self._phases
        if phases.phase not in STEP:
            return config.other_s
        if not phases.follows_other:
            return config.step_s
        return config.step_s + config.other_s if config.step_s and config.other_s else 0.0

    def _watch(self) -> None:
        suspended_s, last_s = 0.0, time.monotonic()
        since_s = self._phases.since_s
        self._arm(self.budget_s())
        while not self._ended.wait(self._tick_s):
            now = time.monotonic()
            gap, last_s = now - last_s, now
            if since_s != self._phases.since_s:
                since_s, suspended_s = self._phases.since_s, 0.0
            if gap > _SUSPENDED_S:
                suspended_s += gap
            waited_s, budget_s = now - since_s - suspended_s, self.budget_s()
            if (budget_s and waited_s > budget_s) or (
                waited_s > self._least_s / 2 and _in_time(self._others_report, 1.0)
            ):
                self._end(waited_s)
            self._arm(budget_s - waited_s if budget_s else 0.0)

    def _arm(self, left_s: float) -> None:
        """Nothing; sets the interpreter's own watchdog a little later than this one; 0 unsets it."""
        if left_s > 0:
            faulthandler.dump_traceback_later(left_s + _BACKSTOP_S, exit=self._is_alone, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _others_report(self) -> bool:
        return hangs.count_reports(self._folder) > 0

    def _end(self, waited_s: float) -> None:
        """Reports, and ends the process."""
        faulthandler.dump_traceback_later(_BACKSTOP_S, exit=True, file=2)
        started = time.monotonic()
        report = self._report(waited_s)
        own = _own_stacks()
        _say(
            f"rank {self._rank}: no progress for {waited_s:.0f} s in phase {report.phase} of step {report.step}; "
            f"stacks in {self._folder}"
        )
        written = _in_time(lambda: self._write(report, own), 2.0)
        if not written:
            _say(f"rank {self._rank}: {self._folder} cannot be written; {report}\n{own}")
        while written and not self._ended.wait(0.05):
            waited = time.monotonic() - started
            if waited > GRACE_S + _VERDICT_S or _in_time(partial(self._settle, waited > GRACE_S), 1.0):
                break
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(Restart.exit_code)

    def _write(self, report: hangs.Report, own: str) -> bool:
        text, given_up = own, time.monotonic() + 1.0
        for child in multiprocessing.active_children() if report.phase == FIRST else ():
            if child.pid is not None and time.monotonic() < given_up:
                text += f"\nLoader process {child.pid}, {stacks.state_of(child.pid)}:\n{stacks.stacks_of(child.pid)}"
        hangs.write_report(self._folder, report, text)
        return True

    def _settle(self, late: bool) -> bool:
        """Whether there is a verdict: the lowest rank that has reported gives it, when all have or it is late."""
        path = self._folder / hangs.VERDICT
        if path.is_file():
            return True
        if not late and hangs.count_reports(self._folder) < len(self._meeting.places):
            return False
        reports = hangs.read_reports(self._folder)
        if reports[0].rank != self._rank:
            return False
        text = hangs.verdict(reports, self._meeting.places)
        _say(f"hang: {text.strip()}")
        path.write_text(text, encoding="utf-8")
        return True

    def _report(self, waited_s: float) -> hangs.Report:
        phases, places = self._phases, self._meeting.places
        own = places[self._rank]
        link = ""
        if self._meeting.address:
            link = network.trouble(own.interface, self._meeting.address, self._meeting.port)
        return hangs.Report(
            rank=self._rank,
            step=phases.step,
            phase=phases.phase,
            position=phases.position,
            collectives=collectives.num_begun(),
            in_collective=any(_is_in_collective(frame) for frame in sys._current_frames().values()),
            waited_s=round(waited_s, 1),
            at=_innermost(sys._current_frames().get(threading.main_thread().ident or 0)),
            link=link,
            neighbours={
                str(rank): stacks.state_of(place.pid)
                for rank, place in enumerate(places)
                if place.pid_space == own.pid_space and rank != self._rank
            },
            loaders=tuple(
                f"loader process {child.pid} is {stacks.state_of(child.pid)}"
                for child in multiprocessing.active_children()
                if child.pid is not None
            ),
        )


def _is_in_collective(frame: FrameType | None) -> bool:
    """Whether a thread's innermost frames are those of torch's or DeepSpeed's messages."""
    return frame is not None and any(part in frame.f_code.co_filename for part in _COLLECTIVES)


def _innermost(frame: FrameType | None) -> str:
    """Our own code's line that a thread is at, such as "trainer.py:155 in _step"."""
    while frame is not None and f"{os.sep}ldm_scale{os.sep}" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _own_stacks() -> str:
    with open(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _in_time(action: Callable[[], bool], limit_s: float) -> bool:
    """The action's answer; False if it fails or takes longer, which a file system may."""
    answers: list[bool] = []

    def act() -> None:
        try:
            answers.append(action())
        except OSError as error:
            _say(f"watchdog: {error}")
        except Exception:  # whatever it is, the run must end
            _say(traceback.format_exc())

    thread = threading.Thread(target=act, name="watchdog-files", daemon=True)
    thread.start()
    thread.join(limit_s)
    return bool(answers) and answers[0]


def _say(text: str) -> None:
    """Writes to stderr past Python's file objects and the log, whose locks a stuck thread may hold."""
    with suppress(OSError):  # a full disk: the run must end all the same
        os.write(2, f"{time.strftime('%H:%M:%S')} {text}\n".encode())
