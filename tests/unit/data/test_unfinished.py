"""Data sets whose making is interrupted: by a kill at any moment, a full disk, Ctrl-C, or a second process."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_scale.data import open_manifest
from ldm_scale.data.sources import Layout, LeftOut, Prepared, Sample, Source, find_prepared, unfinished, workers
from ldm_scale.data.sources.writing import write_dataset
from ldm_scale.errors import DataError
from ldm_scale.prepare import main
from tests.helpers.shards import png

PIXEL = png(Image.new("RGB", (2, 2)))  # what follows its end is no part of it

ROOT = Path(__file__).parents[3]
FORK = multiprocessing.get_context("fork")
REQUEST = {"source": "test", "size": 3}
NUM_ITEMS, PER_SHARD = 22, 4
STATE = ".prepare"


def make(number: int) -> Sample | LeftOut:
    """A sample of most numbers; none of 8 to 11, which are a whole shard."""
    if number % 7 == 3 or 8 <= number < 12:
        return LeftOut(f"item {number}", "odd" if number % 2 else "even")
    return Sample(f"{number:04d}", {"png": PIXEL + bytes([number]) * 2900, "txt": f"number {number}".encode()})


def write(
    out: Path,
    work: Callable[[int], Sample | LeftOut] = make,
    num_workers: int = 2,
    items: Any = range(NUM_ITEMS),
    percent: float = 0.0,
) -> Prepared:
    describe = {"name": "test", "classes": [], "left_out": {"before": 1}, "left_out_names": [], "request": REQUEST}
    source = Source("numbers", items, NUM_ITEMS, work, family=str)
    return write_dataset(out, REQUEST, describe, source, Layout(PER_SHARD, percent, num_workers=num_workers))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(out: Path) -> list[str]:
    """Shards that have a record."""
    return sorted(path.stem for path in (out / STATE).glob("[!.]*-*.json"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    write(out, num_workers=1)
    return contents(out)


def test_shards_are_made_of_fixed_slots(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    manifest = json.loads(undisturbed["manifest.json"])
    rows = manifest["splits"]["train"]["shards"]
    assert [(row["file"], row["num_samples"]) for row in rows] == [
        ("train-000000.tar", 3),
        ("train-000001.tar", 4),
        ("train-000003.tar", 4),
        ("train-000004.tar", 3),
        ("train-000005.tar", 2),
    ]
    assert len(undisturbed) == 2 * len(rows) + 1
    wanted = [number for number in range(NUM_ITEMS) if isinstance(make(number), LeftOut)]
    assert manifest["left_out_names"] == [f"item {n}: {'odd' if n % 2 else 'even'}" for n in wanted]
    assert manifest["left_out"] == {"even": 2, "odd": 4, "before": 1}
    write(tmp_path / "out")
    dataset = open_manifest(tmp_path / "out", "train")
    keys = [dataset.key(number).rpartition("/")[2] for number in range(dataset.num_samples)]
    assert keys == [f"{n:04d}" for n in range(NUM_ITEMS) if n not in wanted]


@pytest.mark.parametrize("percent", [0.0, 30.0])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, percent: float) -> None:
    for num_workers in (1, 2, 5):
        assert not write(tmp_path / str(num_workers), num_workers=num_workers, percent=percent).reused
    one = contents(tmp_path / "1")
    assert "heldout-000000.tar" in one or not percent
    assert one == contents(tmp_path / "2") == contents(tmp_path / "5")


def _in_group(work: Callable[[], object]) -> int:
    """The exit code of a process that does the work in a process group of its own."""

    def run() -> None:
        os.setpgid(0, 0)
        work()

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


class _KillAt:
    """A replacement of `os.replace` that kills all processes of the group at one of its calls."""

    def __init__(self, call: int, after: bool) -> None:
        self._calls, self._call, self._after = FORK.Value("i", 0), call, after

    def __call__(self, source: Any, target: Any, plain: Callable[..., None] = os.replace) -> None:
        with self._calls:
            self._calls.value += 1
            ours = self._calls.value == self._call
        if not ours or self._after:
            plain(source, target)
        if ours:
            os.killpg(0, signal.SIGKILL)


# Of request, tar, sidecar and record of the shards (one has only a record), and manifest: 18 files are renamed.
@pytest.mark.parametrize(("call", "after"), [*((call, False) for call in range(1, 19)), (18, True)])
def test_a_kill_at_any_moment_costs_the_shards_in_work(
    tmp_path: Path, undisturbed: dict[str, bytes], call: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _KillAt(call, after))
        assert _in_group(lambda: write(out)) == -signal.SIGKILL
    assert ("manifest.json" in contents(out)) == after
    kept, made = finished(out), FORK.Value("i", 0)

    def counted(number: int) -> Sample | LeftOut:
        with made:
            made.value += 1
        return make(number)

    global _work
    _work = counted
    write(out, _call_work)
    assert contents(out) == undisturbed
    assert not (out / STATE).exists()
    last = "train-000005" in kept  # a shard of two
    assert made.value == (0 if after else NUM_ITEMS - PER_SHARD * len(kept) + 2 * last)


_work: Callable[[int], Sample | LeftOut] = make


def _call_work(number: int) -> Sample | LeftOut:
    """Calls what a test has put there: what is sent to a worker must be found by its name."""
    return _work(number)


def test_a_kill_within_a_shard(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"

    def killed(number: int) -> Sample | LeftOut:
        if number == 18:
            os.killpg(0, signal.SIGKILL)
        return make(number)

    global _work
    _work = killed
    assert _in_group(lambda: write(out, _call_work, num_workers=1)) == -signal.SIGKILL
    assert finished(out) == [f"train-{number:06d}" for number in range(4)]
    assert any(name.startswith(".train-000004.tar.partial-") for name in contents(out))
    assert find_prepared(out, REQUEST) is None
    with pytest.raises(DataError, match=r"out/manifest\.json: .* not finished; run the same `ldm-scale prepare` again"):
        open_manifest(out, "train")
    write(out)
    assert contents(out) == undisturbed


SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background, it is ignored by all
from ldm_scale.__main__ import main
from ldm_scale.data.sources import openmoji_scenes
plain = openmoji_scenes.make_scene
def slow(number, request):
    time.sleep(0.01 if number < 60 else float(os.environ["LATER_S"]))
    return plain(number, request)
openmoji_scenes.make_scene = slow
sys.exit(main(sys.argv[1:]))
"""
SCENES = ["openmoji-scenes", "--subset", "demo", "--resolution", "16", "--num-samples", "200", "--samples-per-shard"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("scenes") / "out"
    assert main([*SCENES, "10", "--out", str(out)]) == 0
    return contents(out)


def _start(out: Path, later_s: float = 0.01) -> subprocess.Popen[str]:
    """The real command, slowed down, and more so after six shards, once it has finished some."""
    arguments = ["prepare", *SCENES, "10", "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        cwd=ROOT,
        env={**os.environ, "LATER_S": str(later_s)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(finished(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    return process


def _members(group: int) -> list[int]:
    """Living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("wait_s", [0.0, 0.13])
def test_the_command_goes_on_after_its_process_was_killed(
    tmp_path: Path, scenes: dict[str, bytes], wait_s: float
) -> None:
    """Only the process itself is killed: its workers must notice, or they would hold the folder for ever."""
    out = tmp_path / "out"
    process = _start(out)
    time.sleep(wait_s)
    assert len(_members(process.pid)) == 3
    process.kill()
    process.communicate(timeout=30)
    assert main([*SCENES, "10", "--out", str(out)]) == 0
    assert _members(process.pid) == []
    assert contents(out) == scenes


def test_ctrl_c_ends_soon_and_says_what_is_done(tmp_path: Path, scenes: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    process = _start(out, later_s=4.0)
    time.sleep(0.5)  # now it is in shards that take forty seconds
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    errors = process.communicate(timeout=110)[1]
    assert process.returncode == 130
    assert f"{out}: " in errors
    assert "images are done; the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert len(finished(out)) >= 3
    assert not [name for name in contents(out) if "partial" in name]
    assert _members(process.pid) == []
    assert main([*SCENES, "10", "--out", str(out)]) == 0
    assert contents(out) == scenes


def test_a_second_process_is_refused(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, reached, go = tmp_path / "out", FORK.Event(), FORK.Event()

    def waits(number: int) -> Sample | LeftOut:
        reached.set()
        assert go.wait(60)
        return make(number)

    global _work
    _work = waits
    first = FORK.Process(target=lambda: write(out, _call_work))
    first.start()
    assert reached.wait(60)
    monkeypatch.setattr(unfinished, "_WAIT_S", 0.1)
    with pytest.raises(DataError, match="another process is preparing this data set; wait for it"):
        write(out)
    monkeypatch.setattr(unfinished, "_WAIT_S", 60.0)
    second = FORK.Process(target=lambda: sys.exit(int(write(out).reused)))
    second.start()
    go.set()
    first.join(60)
    second.join(60)
    assert (first.exitcode, second.exitcode) == (0, 1)  # the one that waited found the other's
    assert contents(out) == undisturbed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_with_a_message_and_breaks_nothing(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, plain, calls = tmp_path / "out", os.fsync, FORK.Value("i", 0)

    def full(descriptor: int) -> None:
        with calls:
            calls.value += 1
            if calls.value > 8:
                raise OSError(number, os.strerror(number))
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=rf"out: cannot be written \({os.strerror(number)}\); \d+ images are done"):
            write(out)
    assert finished(out)
    assert not [name for name in contents(out) if "partial" in name]
    assert find_prepared(out, REQUEST) is None
    write(out)
    assert contents(out) == undisturbed


@pytest.mark.parametrize("limit", [100, 4000, 13000])
def test_what_the_system_refuses_to_write(tmp_path: Path, undisturbed: dict[str, bytes], limit: int) -> None:
    """No file may be larger than the limit: none at all, no tar, only tars of three."""
    out = tmp_path / "out"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(DataError, match=r"cannot be written \(File too large\)"):
            write(out, num_workers=1)
        sys.exit(7)

    assert _in_group(limited) == 7
    assert not [name for name in contents(out) if "partial" in name]
    write(out)
    assert contents(out) == undisturbed


def test_few_items_are_in_memory(tmp_path: Path) -> None:
    out, num_workers, ahead = tmp_path / "out", 1, []

    def items() -> Iterator[int]:
        for number in range(NUM_ITEMS):
            ahead.append(number - PER_SHARD * len(finished(out)))
            yield number

    write(out, num_workers=num_workers, items=items())
    assert max(ahead) <= workers.TASKS_PER_WORKER * num_workers * PER_SHARD + PER_SHARD


def test_an_unfinished_data_set_is_for_one_request_and_the_same_versions(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"a worker process died.*the same command again"):
        write(out, _dies, num_workers=1)
    assert len(finished(out)) == 5
    with pytest.raises(DataError, match=r"holds an unfinished data set begun by another request: .*size=3.*size=4"):
        find_prepared(out, {**REQUEST, "size": 4})
    with monkeypatch.context() as patch:
        patch.setattr("ldm_scale.data.sources.writing.version", lambda package: "0.1")
        with pytest.raises(DataError, match=r"begun with pillow [\d.]+, now it is pillow 0.1; go on with the same"):
            write(out)
    write(out)
    assert contents(out) == undisturbed


def _dies(number: int) -> Sample | LeftOut:
    if number == 21:
        os._exit(9)
    return make(number)


def test_a_finished_shard_that_is_no_longer_whole_is_made_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError):
        write(out, _dies, num_workers=1)
    (out / "train-000000.tar").write_bytes(b"")
    next(out.glob("train-000001.index.*")).unlink()
    (out / STATE / "train-000002.json").write_text("{")
    write(out)
    assert contents(out) == undisturbed


def test_a_failure_keeps_what_is_finished_and_an_empty_data_set_keeps_nothing(tmp_path: Path) -> None:
    calls = count()
    for work, kept in ((_fails_late, 4), (_fails, 0)):
        out = tmp_path / str(next(calls))
        with pytest.raises(ZeroDivisionError):
            write(out, work, num_workers=1)
        assert len(finished(out)) == kept
        assert out.exists() == bool(kept)
    with pytest.raises(DataError, match=r"numbers: none of 22 images can be used; item 0: never"):
        write(tmp_path / "none", _never)
    with pytest.raises(DataError, match=r"no sample falls into the split 'heldout' with --heldout-percent 0.001"):
        write(tmp_path / "none", percent=0.001)
    assert not (tmp_path / "none").exists()


def _fails(number: int) -> Sample | LeftOut:
    raise ZeroDivisionError


def _fails_late(number: int) -> Sample | LeftOut:
    return make(number) if number < 17 else _fails(number)


def _never(number: int) -> Sample | LeftOut:
    return LeftOut(f"item {number}", "never")
