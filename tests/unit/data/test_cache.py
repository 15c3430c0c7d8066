from __future__ import annotations

import fcntl
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ldm_scale.data.cache import RangeCache, identity
from ldm_scale.data.remote import Version, close_filesystems
from ldm_scale.data.storage import Storage, StorageSettings
from ldm_scale.errors import ConfigError
from tests.helpers.fault_server import FaultServer, fault

PIECE = 1000
CONTENT = np.random.default_rng(0).bytes(20_500)  # 21 pieces, the last one shorter
PATH = "/x.tar"
ROOMY = 1_000_000
SETTINGS = StorageSettings(connect_s=1.0, stall_s=0.5, budget_s=2.0, max_retries=2, backoff_s=0.01)


@pytest.fixture(scope="module")
def one_server() -> Iterator[FaultServer]:
    with FaultServer({PATH: CONTENT}) as made:
        yield made
    close_filesystems()


@pytest.fixture
def server(one_server: FaultServer) -> FaultServer:
    one_server.reset({PATH: CONTENT, "/y.tar": CONTENT[::-1]})
    return one_server


def _storage(folder: Path, max_bytes: int = ROOMY) -> Storage:
    """As another process would make it: nothing in memory, everything in the folder."""
    return Storage(SETTINGS, RangeCache(folder, max_bytes, PIECE))


def _pieces(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/??/*") if not path.name.startswith(".partial-"))


def _used(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/??/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed or evicted meanwhile
            continue
    return total


def test_ranges_come_from_the_folder_the_second_time(server: FaultServer, tmp_path: Path) -> None:
    rng = random.Random(0)
    first = _storage(tmp_path)
    ranges = [sorted(rng.choices(range(len(CONTENT) + 1), k=2)) for _ in range(60)]
    ranges += [[0, PIECE], [PIECE, 2 * PIECE], [20_000, 20_500], [20_499, 20_500], [0, 20_500], [5, 5]]
    for start, stop in ranges:
        assert first.read(server.url(PATH), start, stop) == CONTENT[start:stop]
    assert b"".join(first.stream(server.url(PATH))) == CONTENT
    assert len(_pieces(tmp_path)) == 21
    # Every piece came once, and the object's version was asked for once, with a byte.
    assert server.count(PATH).num_bytes == len(CONTENT) + 1
    again = _storage(tmp_path)
    for start, stop in ranges:
        assert again.read(server.url(PATH), start, stop) == CONTENT[start:stop]
    assert b"".join(again.stream(server.url(PATH), 1_234)) == CONTENT[1_234:]
    assert server.count(PATH).num_bytes == len(CONTENT) + 2


def test_neighbouring_pieces_come_with_one_request(server: FaultServer, tmp_path: Path) -> None:
    storage = _storage(tmp_path)
    assert storage.read(server.url(PATH), 4_500, 6_500) == CONTENT[4_500:6_500]
    assert storage.read(server.url(PATH), 500, 15_500) == CONTENT[500:15_500]
    wanted = ["bytes=0-0", "bytes=4000-6999", "bytes=0-3999", "bytes=7000-15999"]
    assert server.count(PATH).ranges == wanted


@pytest.mark.parametrize("damage", ["bit", "short", "long", "empty", "swapped"])
def test_a_damaged_piece_is_fetched_anew(server: FaultServer, tmp_path: Path, damage: str) -> None:
    url = server.url(PATH)
    assert _storage(tmp_path).read_all(url) == CONTENT
    pieces = [path for path in _pieces(tmp_path) if path.stat().st_size == PIECE + 20]
    contents = [path.read_bytes() for path in pieces]
    rng = random.Random(1)
    for number, (path, content) in enumerate(zip(pieces, contents, strict=True)):
        position = rng.randrange(len(content))
        match damage:
            case "bit":
                content = (
                    content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]
                )
            case "short":
                content = content[:position]
            case "long":
                content += b"x"
            case "empty":
                content = b""
            case "swapped":
                content = contents[number - 1]
        path.write_bytes(content)
    before = server.count(PATH).num_bytes
    assert _storage(tmp_path).read_all(url) == CONTENT
    assert server.count(PATH).num_bytes == before + 1 + len(pieces) * PIECE
    assert _storage(tmp_path).read_all(url) == CONTENT
    assert server.count(PATH).num_bytes == before + 2 + len(pieces) * PIECE


def test_another_version_has_other_pieces(server: FaultServer, tmp_path: Path) -> None:
    assert _storage(tmp_path).read_all(server.url(PATH)) == CONTENT
    server.files[PATH] = CONTENT[::-1]
    assert _storage(tmp_path).read_all(server.url(PATH)) == CONTENT[::-1]


def test_an_object_without_tag_and_date_is_not_kept(tmp_path: Path) -> None:
    with FaultServer({PATH: CONTENT}, validators=False) as server:
        assert _storage(tmp_path).read_all(server.url(PATH)) == CONTENT
        assert _storage(tmp_path).read(server.url(PATH), 5, 5_000) == CONTENT[5:5_000]
    assert _pieces(tmp_path) == []


def test_bytes_that_the_reader_refuses_are_not_kept(server: FaultServer, tmp_path: Path) -> None:
    storage, right = _storage(tmp_path), CONTENT[500:3_500]
    assert storage.version(server.url(PATH)).size == len(CONTENT)
    server.plan(PATH, fault("corrupt", after=1_700))
    assert storage.read(server.url(PATH), 500, 3_500, accept=lambda data: data == right) == right
    assert _storage(tmp_path).read(server.url(PATH), 500, 3_500) == right


def test_a_new_signature_is_the_same_object_and_no_secret_is_in_a_name(server: FaultServer, tmp_path: Path) -> None:
    url = server.url(PATH).replace("//", "//user:canary@")
    assert _storage(tmp_path).read_all(f"{url}?X-Amz-Signature=canary1&X-Amz-Date=1&id=7") == CONTENT
    assert _storage(tmp_path).read_all(f"{url}?X-Amz-Signature=canary2&X-Amz-Date=2&id=7") == CONTENT
    assert server.count(PATH).num_bytes == len(CONTENT) + 2
    # What is no signature may name another object.
    assert _storage(tmp_path).read(f"{url}?X-Amz-Signature=canary2&id=8", 0, 10) == CONTENT[:10]
    assert server.count(PATH).num_bytes == len(CONTENT) + 3 + PIECE
    assert not [path for path in tmp_path.rglob("*") if "canary" in str(path)]
    assert identity("https://u:p@h/x?sig=a&se=1&id=7#f") == "https://h/x?id=7"
    assert identity("s3://k:s@b/x") == "s3://b/x"
    assert not [path for path in _pieces(tmp_path) if b"canary" in path.read_bytes()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_the_least_recently_used_goes_first(server: FaultServer, tmp_path: Path) -> None:
    storage = _storage(tmp_path, max_bytes=20 * (PIECE + 20))
    url, other = server.url(PATH), server.url("/y.tar")
    for start in range(0, 10_000, PIECE):
        storage.read(url, start, start + PIECE)
    for age, path in enumerate(_pieces(tmp_path)):
        os.utime(path, (1_000 + age, 1_000 + age))
    hot = CONTENT[3_000:5_000]
    assert storage.read(url, 3_000, 5_000) == hot
    for start in range(0, 15_000, PIECE):
        storage.read(other, start, start + PIECE)
        assert _used(tmp_path) <= 20 * (PIECE + 20)
    before = server.count(PATH).requests
    assert storage.read(url, 3_000, 5_000) == hot
    assert server.count(PATH).requests == before
    assert len(_pieces(tmp_path)) >= 17  # eviction leaves nine tenths, less than one more piece


def test_several_processes_stay_within_the_bound(server: FaultServer, tmp_path: Path) -> None:
    limit = 16 * (PIECE + 20)
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                storage, rng = _storage(tmp_path, limit), random.Random(number)
                for _ in range(60):
                    path, content = rng.choice([(PATH, CONTENT), ("/y.tar", CONTENT[::-1])])
                    start = rng.randrange(19_000)
                    assert storage.read(server.url(path), start, start + 1_500) == content[start : start + 1_500]
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    most, codes = 0, {}
    while len(codes) < len(children):
        most = max(most, _used(tmp_path))
        for child in children:
            found, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    assert list(codes.values()) == [0] * 4
    # A piece that is renamed while the test adds up may be counted under both names, in every process.
    assert limit / 2 < most <= limit + 4 * (PIECE + 20)
    assert _used(tmp_path) <= limit


def test_processes_that_are_killed_leave_nothing_harmful(server: FaultServer, tmp_path: Path) -> None:
    limit = 16 * (PIECE + 20)
    rng = random.Random(0)
    for number in range(12):
        child = os.fork()
        if child == 0:
            storage = _storage(tmp_path, limit)
            while True:
                start = random.randrange(19_000)
                storage.read(server.url(PATH), start, start + 1_500)
        time.sleep(0.05 + rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert _storage(tmp_path, limit).read(server.url(PATH), number * 777, 20_000) == CONTENT[number * 777 : 20_000]
    assert _used(tmp_path) <= limit


def test_partial_files_of_the_dead_are_removed_and_those_of_the_living_are_not(
    server: FaultServer, tmp_path: Path
) -> None:
    storage = _storage(tmp_path, max_bytes=16 * (PIECE + 20))
    storage.read(server.url(PATH), 0, 10)
    folder = _pieces(tmp_path)[0].parent
    old, new = folder / ".partial-old", folder / ".partial-new"
    for path in (old, new):
        path.write_bytes(bytes(2_000))
    os.utime(old, (0, time.time() - 3_600))
    storage.read_all(server.url(PATH))
    assert not old.exists()
    assert new.exists()
    assert _used(tmp_path) <= 16 * (PIECE + 20)


def test_room_is_taken_before_it_is_filled(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 16 * (PIECE + 20), PIECE)
    partial = tmp_path / "pieces-v1" / "ab" / ".partial-1"
    partial.parent.mkdir(parents=True)
    assert cache._reserve(partial, PIECE + 20)
    assert _used(tmp_path) == PIECE + 20
    assert not cache._reserve(tmp_path / "pieces-v1" / "ab" / ".partial-2", 16 * (PIECE + 20))


@pytest.mark.parametrize("text", [b"%020d" % 10**15, b"", b"garbage", b"%020d" % 0])
def test_a_wrong_count_is_put_right(server: FaultServer, tmp_path: Path, text: bytes) -> None:
    storage = _storage(tmp_path, max_bytes=16 * (PIECE + 20))
    storage.read(server.url(PATH), 0, 5_000)
    (count,) = tmp_path.glob("*/used")
    count.write_bytes(text)
    storage.read(server.url("/y.tar"), 0, 5_000)
    if text != b"%020d" % 0:
        assert int(count.read_bytes()) == _used(tmp_path) == 10 * (PIECE + 20)


def test_a_lock_that_another_process_keeps_stops_nothing(server: FaultServer, tmp_path: Path) -> None:
    storage = _storage(tmp_path)
    storage.read(server.url(PATH), 0, 10)
    (count,) = tmp_path.glob("*/used")
    with count.open("r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        began = time.monotonic()
        assert storage.read(server.url(PATH), 1_000, 4_000) == CONTENT[1_000:4_000]
        assert time.monotonic() - began < 2
        assert len(_pieces(tmp_path)) == 1
    storage.read(server.url(PATH), 1_000, 4_000)
    assert len(_pieces(tmp_path)) == 4


def test_a_folder_that_refuses_is_said_once_and_stops_nothing(
    server: FaultServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    storage = _storage(tmp_path / "file")
    for start in range(0, 9_000, 1_000):
        assert storage.read(server.url(PATH), start, start + 1_500) == CONTENT[start : start + 1_500]
    assert capfd.readouterr().err.count("cannot be written (Not a directory)") == 1


def test_a_full_disk_stops_nothing(server: FaultServer, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))  # the write fails half way, as on a full disk
            storage = _storage(tmp_path)
            assert storage.read_all(server.url(PATH)) == CONTENT
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.glob("*/??/*")) == []  # nothing partial is left
    assert _storage(tmp_path).read_all(server.url(PATH)) == CONTENT
    assert len(_pieces(tmp_path)) == 21


def test_writing_goes_on_when_the_folder_takes_it_again(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_scale.data.cache._PAUSE_S", 0.05)
    (tmp_path / "folder").touch()
    storage = _storage(tmp_path / "folder")
    storage.read_all(server.url(PATH))
    (tmp_path / "folder").unlink()
    time.sleep(0.06)
    storage.read_all(server.url(PATH))
    assert len(_pieces(tmp_path / "folder")) == 21


def test_a_broken_connection_leaves_whole_pieces(server: FaultServer, tmp_path: Path) -> None:
    storage = _storage(tmp_path)
    storage.version(server.url(PATH))
    server.plan(PATH, fault("close", after=5_500), fault("reset", after=700))
    assert storage.read_all(server.url(PATH)) == CONTENT
    assert server.count(PATH).ranges[1:] == ["bytes=0-20499", "bytes=5500-20499", "bytes=6200-20499"]
    assert _storage(tmp_path).read_all(server.url(PATH)) == CONTENT


def test_too_small_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="room for 16 pieces"):
        RangeCache(tmp_path, 15 * PIECE, PIECE)


def test_versions_without_a_tag_differ_by_date(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, ROOMY, PIECE)
    assert cache.holds("s3://b/x", Version(5, None, "today"))
    names = {cache._path("s3://b/x", Version(5, None, day), 0) for day in ("today", "yesterday")}
    assert len(names) == 2


@pytest.mark.parametrize("trouble", ["not a folder", "no room"])
def test_what_cannot_be_kept_is_fetched_without_the_rest_of_its_pieces(
    server: FaultServer, tmp_path: Path, trouble: str
) -> None:
    if trouble == "not a folder":
        (tmp_path / "cache").touch()
    else:
        partial = tmp_path / "cache" / "pieces-v1" / "ab" / ".partial-other"
        partial.parent.mkdir(parents=True)
        partial.write_bytes(bytes(16 * PIECE))
    storage = _storage(tmp_path / "cache", 16 * (PIECE + 20))
    assert storage.read(server.url(PATH), 10, 20) == CONTENT[10:20]
    assert storage.read(server.url(PATH), 5_010, 5_020) == CONTENT[5_010:5_020]
    if trouble == "no room":
        assert storage.read(server.url(PATH), 7_990, 9_010) == CONTENT[7_990:9_010]
    wanted = ["bytes=0-0", "bytes=0-999", "bytes=5010-5019", "bytes=7990-9009"]
    assert server.count(PATH).ranges == (wanted if trouble == "no room" else wanted[:3])


def test_a_folder_that_refuses_still_gives_what_it_has(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = _storage(tmp_path)
    storage.read(server.url(PATH), 3_000, 5_000)
    storage.read(server.url(PATH), 8_000, 9_000)
    monkeypatch.setattr(RangeCache, "_is_paused", lambda _: True)
    assert storage.read(server.url(PATH), 2_900, 9_500) == CONTENT[2_900:9_500]
    assert server.count(PATH).ranges[3:] == ["bytes=2900-2999", "bytes=5000-7999", "bytes=9000-9499"]
