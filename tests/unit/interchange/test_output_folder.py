"""Folders of results: nothing of others' is taken away, and nothing half-written stays, whatever ends the program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.output_folder import published_folder, require_apart, require_replaceable

WRITER = """
import signal, sys, time
from pathlib import Path
from ldm_scale.interchange.output_folder import published_folder, temporary_folder
for number in (signal.SIGINT, signal.SIGHUP):  # where tests run in the background, all ignore one of them
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
with published_folder(Path(sys.argv[1]), may_replace=bool) as folder, temporary_folder(folder.parent.parent):
    (folder / "part").write_text("half")
    print("writing", flush=True)
    for _ in range(6000):  # a signal that Python notices just before a sleep is handled after it
        time.sleep(0.01)
"""


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_files_that_come_while_it_is_written_stay(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write() -> None:
        with published_folder(target, may_replace=bool) as folder:
            (folder / "new").touch()
            target.mkdir(exist_ok=True)
            (target / "mine.txt").write_text("work of hours")

    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"out has changed since this .* \(mine\.txt\), so it is left as it is"
        ):
            write()
        assert contents(tmp_path) == ["out", "out/mine.txt"]
        (target / "mine.txt").write_text("less")  # then it is there from the beginning, and changed
    with published_folder(target, may_replace=bool) as folder:
        (folder / "new").touch()
    assert contents(tmp_path) == ["out", "out/new"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_request_to_end_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "old").mkdir()
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(contents(tmp_path)) > 2
        process.send_signal(number)
        assert process.wait(30) == -number  # as if nobody had caught it
    assert contents(tmp_path) == ["old"]


def test_signals_are_as_before_afterwards_and_where_others_handle_them(tmp_path: Path) -> None:
    with published_folder(tmp_path / "out", may_replace=bool):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        with published_folder(tmp_path / "out", may_replace=bool):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [signal.SIGTERM]
    assert contents(tmp_path) == ["out"]


def test_the_current_folder_is_no_place_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (".", str(tmp_path), "../" + tmp_path.name):
        with pytest.raises(CheckpointError, match="is the current folder, which cannot be replaced: give a new folder"):
            require_replaceable(Path(path), bool)
    with pytest.raises(CheckpointError, match="/proc is a mount point"):
        require_replaceable(Path("/proc"), bool)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    with published_folder(tmp_path / "link", may_replace=bool) as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path) == ["disk", "disk/out", "disk/out/new", "link"]


@pytest.mark.parametrize(("target", "word"), [("models/sd1", "is"), ("models", "holds"), ("x/../models/sd1", "is")])
def test_the_source_is_not_replaced(tmp_path: Path, target: str, word: str) -> None:
    source = tmp_path / "models" / "sd1"
    source.mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"--out .* {word} .*sd1, which is read and would be replaced: give another"):
        require_apart(tmp_path / target, source)
    require_apart(source / "diffusers", source)
    require_apart(tmp_path / "models" / "sd10", source)
