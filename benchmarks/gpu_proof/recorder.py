"""A pytest plugin: takes a share of the tests, stops at a deadline, and notes every result as it comes.

    python -m pytest -p benchmarks.gpu_proof.recorder tests/kernels/test_geglu.py

Three variables set it up: GPU_PROOF_RECORD, the file of the notes (one JSON object a line); GPU_PROOF_SHARE, I/N: every
N-th test from the I-th on; GPU_PROOF_DEADLINE, in Unix time: later tests are not run and noted as not reached. The
notes outlive a process that a kernel takes down, and tell which test it was in: started again, the process goes on
after that one. A CUDA error is no different, since every later test would fail with it, nor is a test that takes
longer than TEST_LIMIT_S: a kernel that hangs cannot be interrupted. A process that is asked to end (SIGTERM) notes
that, and the test that it was in counts as not reached; one that a kernel holds never comes to it, and is killed.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_proof.pieces import EXIT_RESTART

NOT_REACHED = "the time is up"
SURVIVED_BY_NONE = "the process did not survive it"
TEST_LIMIT_S = 100.0
LOST_DEVICE = ("CUDA error", "Triton Error [CUDA]")  # torch's words and Triton's
_WATCHDOG = pytest.StashKey[threading.Timer]()


@dataclass
class Record:
    """What the notes say: the last outcome and reason of each test, and the test that a process did not survive."""

    ended: dict[str, tuple[str, str]]
    begun: str | None

    def with_outcome(self, outcome: str) -> dict[str, str]:
        """Tests that ended so, with the reason; those not reached are no skips."""
        return {
            test: reason for test, (how, reason) in self.ended.items() if how == outcome and NOT_REACHED not in reason
        }

    def not_reached(self) -> list[str]:
        """Tests that the time did not suffice for."""
        return [test for test, (_, reason) in self.ended.items() if NOT_REACHED in reason]


def read_record(path: Path) -> Record:
    """The notes of all processes that wrote to the file."""
    ended: dict[str, tuple[str, str]] = {}
    begun = None
    for line in path.read_text().splitlines() if path.exists() else ():
        event = json.loads(line)
        if "begin" in event:
            begun = event["begin"]
            continue
        if "stopped" in event:
            if begun is not None:
                ended[begun] = "skipped", NOT_REACHED
            begun = None
            continue
        # A test whose body passed can still fail while it is torn down.
        if event["outcome"] != "passed" or event["end"] not in ended:
            ended[event["end"]] = event["outcome"], event["reason"]
        begun = None if begun == event["end"] else begun
    return Record(ended, begun)


def pytest_configure() -> None:
    """From here on an end that was asked for is noted."""
    process = os.getpid()

    def stop(*_: object) -> None:
        # Processes that tests start inherit the handler.
        if os.getpid() == process:
            _note({"stopped": True})
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps this process's share of what -k has left, less what an earlier process did."""
    first, every = (int(part) for part in os.environ.get("GPU_PROOF_SHARE", "1/1").split("/"))
    record = read_record(Path(os.environ.get("GPU_PROOF_RECORD", os.devnull)))
    if record.begun:
        _note({"end": record.begun, "outcome": "failed", "reason": SURVIVED_BY_NONE})
        record.ended[record.begun] = "failed", SURVIVED_BY_NONE
    items[:] = [item for item in items[first - 1 :: every] if item.nodeid not in record.ended]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Notes that the test begins, or skips it."""
    if time.time() > float(os.environ.get("GPU_PROOF_DEADLINE", "inf")):
        pytest.skip(NOT_REACHED)
    _note({"begin": item.nodeid})
    item.stash[_WATCHDOG] = threading.Timer(TEST_LIMIT_S, os._exit, [EXIT_RESTART])
    item.stash[_WATCHDOG].daemon = True
    item.stash[_WATCHDOG].start()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """The test has come back."""
    if _WATCHDOG in item.stash:
        item.stash[_WATCHDOG].cancel()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes how the test ended; a failure with the first line of its reason."""
    if report.when != "call" and report.outcome == "passed":
        return
    reason = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(crash.message if crash else report.longrepr).strip().partition("\n")[0][:400]
    _note({"end": report.nodeid, "outcome": report.outcome, "reason": reason})
    if report.failed and any(words in str(report.longrepr) for words in LOST_DEVICE):
        # Not an orderly end: what waits for the lost device would hang.
        os._exit(EXIT_RESTART)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Notes what could not even be collected."""
    if report.failed:
        lines = str(report.longrepr).strip().splitlines()
        _note({"end": report.nodeid, "outcome": "failed", "reason": lines[-1][:400] if lines else "not collected"})


def _note(event: dict[str, Any]) -> None:
    path = os.environ.get("GPU_PROOF_RECORD")
    if path:
        # Unbuffered, so that a signal cannot leave half a line.
        with Path(path).open("ab", buffering=0) as file:
            file.write((json.dumps(event) + "\n").encode())
