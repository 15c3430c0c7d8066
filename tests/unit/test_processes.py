from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import ldm_scale
from ldm_scale.processes import end_with_launcher, end_with_parent

ROOT = Path(ldm_scale.__file__).parents[1]


def _lives_on(begin: Callable[[int], None], wait_s: float = 10.0) -> bool:
    """Whether a process that has called begin(its parent) lives after its parent was killed."""
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        own = os.getpid()
        if not os.fork():
            begin(own)
            os.write(writing, f"{os.getpid()}".encode())
        time.sleep(60)
        os._exit(0)
    child = psutil.Process(int(os.read(reading, 20)))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        child.wait(wait_s)
    except psutil.TimeoutExpired:
        child.kill()
        return True
    finally:
        os.close(reading)
        os.close(writing)
    return False


def test_a_process_ends_with_its_parent() -> None:
    assert _lives_on(lambda parent: None, 0.5)
    assert not _lives_on(end_with_parent)


def test_a_process_whose_parent_is_gone_already_ends_at_once() -> None:
    pid = os.fork()
    if not pid:
        end_with_parent(os.getpid())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(("variable", "lives"), [("TORCHELASTIC_RUN_ID", False), ("CROSS_RANK", False), ("RANK", True)])
def test_a_rank_ends_with_its_launcher(monkeypatch: pytest.MonkeyPatch, variable: str, lives: bool) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "0")
    assert _lives_on(lambda parent: end_with_launcher(), 0.5 if lives else 10) == lives


CHAIN = """
import os, subprocess, sys, time
if len(sys.argv) > 1:
    subprocess.run([sys.executable, *sys.argv[1:]])
else:
    from ldm_scale.processes import end_with_launcher
    end_with_launcher()
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("name", "lives"), [("deepspeed", False), ("deepspeed_in_a_shell", True)])
def test_a_rank_ends_with_the_deepspeed_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lives: bool
) -> None:
    """It is what a user kills; the launch process below it, whose child the rank is, is not told."""
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command, launch, rank = (str(tmp_path / part) for part in (name, "launch.py", "rank.py"))
    for path in (command, launch, rank):
        Path(path).write_text(CHAIN)
    with subprocess.Popen([sys.executable, command, launch, rank], stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        child = psutil.Process(int(front.stdout.readline()))
        launcher = psutil.Process(child.ppid())
        front.kill()  # and nobody waits for it yet
        if lives:
            with pytest.raises(psutil.TimeoutExpired):
                child.wait(0.5)
            child.kill()
        child.wait(10)
        launcher.wait(10)
