"""Another process tells its stacks, and what it is at, without a file on any disk."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

from ldm_scale.telemetry import stacks


def _sleep_for_long(ready: Connection, answers: bool) -> None:
    if answers:
        stacks.answer()
    ready.send_bytes(b"ready")
    time.sleep(600)


def test_a_process_that_sleeps_answers_again_and_again() -> None:
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_sleep_for_long, args=(sender, True))
    process.start()
    assert process.pid is not None
    try:
        receiver.recv_bytes()
        for _ in range(2):
            text = stacks.stacks_of(process.pid)
            assert text.count("in _sleep_for_long") == 1
        assert stacks.state_of(process.pid) == "sleeping"
        os.kill(process.pid, signal.SIGSTOP)
        while stacks.state_of(process.pid) != "stopped":
            time.sleep(0.01)
        assert stacks.stacks_of(process.pid) == ""
    finally:
        process.kill()
        process.join()
    assert stacks.state_of(process.pid) == "gone"


def test_a_process_that_was_not_made_ready_is_left_alone() -> None:
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_sleep_for_long, args=(sender, False))
    process.start()
    assert process.pid is not None
    try:
        receiver.recv_bytes()
        assert stacks.stacks_of(process.pid) == ""
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
