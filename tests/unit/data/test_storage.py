from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_scale.data import remote
from ldm_scale.data.cache import RangeCache
from ldm_scale.data.failures import describe, of_status
from ldm_scale.data.storage import Storage, StorageError, StorageSettings
from ldm_scale.errors import DataError
from tests.helpers.fault_server import FAULTS, OK, Fault, FaultServer, fault
from tests.helpers.s3 import S3_CREDENTIALS, use_s3

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = CONTENT[::-1]
QUICK = StorageSettings(
    connect_s=1.0, stall_s=0.2, min_bytes_per_s=50_000, budget_s=1.2, max_retries=3, backoff_s=0.01, max_backoff_s=0.05
)
PATIENT = replace(QUICK, budget_s=30.0)  # where the time is not what is looked at
# Every read of CONTENT ends by then: the budget, and the time of its bytes at the lowest speed.
BOUND_S = QUICK.budget_s + len(CONTENT) / QUICK.min_bytes_per_s + 1
CANARIES = (*S3_CREDENTIALS.values(), "canarysigned", "canarypassword", "canaryuser")
PATH = "/bucket/x.tar"


FILES = {PATH: CONTENT, "/bucket/large": CONTENT * 50, "/bucket/empty": b""}


@pytest.fixture(scope="module")
def one_server() -> Iterator[FaultServer]:
    with FaultServer(FILES) as made:
        yield made
    remote.close_filesystems()


@pytest.fixture
def server(one_server: FaultServer) -> FaultServer:
    one_server.reset(FILES)
    return one_server


@pytest.fixture(params=["http", "s3"])
def url(request: pytest.FixtureRequest, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where CONTENT lies: the same server is a web server, and an S3 endpoint as far as reading objects goes."""
    if request.param == "http":
        return server.url(PATH)
    use_s3(monkeypatch, f"http://{server.host}")
    Storage(PATIENT).size("s3://bucket/empty")  # the first use imports and configures a lot
    server.reset(FILES)
    return "s3:/" + PATH


def _fault(kind: str, after: int = 50_000) -> Fault:
    content = {"changed": OTHER, "redirect": b"/bucket/nowhere"}.get(kind, b"")
    return fault(kind, after=after, content=content, seconds=0.05 if kind == "drip" else 30)


# Web servers, and S3 as far as it is HTTP


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind not in ("corrupt", "changed", "gzip", "no_length")])
def test_a_passing_fault_changes_nothing(server: FaultServer, url: str, kind: str) -> None:
    there = fault("redirect", content=server.url(PATH).encode())
    server.plan(PATH, *[there if kind == "redirect" else _fault(kind)] * 2)
    if url.startswith("s3") and kind in ("ignore_range", "chunked", "redirect", "html"):
        return  # no S3 API does so; as a lasting fault it is an error below
    assert Storage(PATIENT).read(url, 5_000, 290_000) == CONTENT[5_000:290_000]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_lasting_fault_ends_in_the_bytes_or_an_error(server: FaultServer, url: str, kind: str) -> None:
    server.always(PATH, _fault(kind))
    through = ["reset", "close", "stall", "less"] + (
        ["ignore_range", "chunked"] if url.startswith("http") else ["gzip"]
    )
    began = time.monotonic()
    if kind in ("corrupt", "changed"):  # nothing but a checksum can tell on a first read
        with pytest.raises(StorageError, match="3 times in a row"):
            Storage(QUICK).read(url, 5_000, 290_000, accept=lambda data: data == CONTENT[5_000:290_000])
    elif kind in through:  # each answer brings a part or all; S3 never compresses what it sends
        assert Storage(QUICK).read(url, 5_000, 290_000) == CONTENT[5_000:290_000]
    else:
        with pytest.raises(StorageError) as caught:
            Storage(QUICK).read(url, 5_000, 290_000)
        assert caught.value.url == url
        assert caught.value.num_tries >= 1
    assert time.monotonic() - began < BOUND_S


@pytest.mark.parametrize("kind", ["reset", "close", "stall"])
def test_a_read_goes_on_at_the_byte_where_it_broke(server: FaultServer, url: str, kind: str) -> None:
    server.plan(PATH, _fault(kind, after=40_000), _fault(kind, after=1))
    assert Storage(PATIENT).read(url, 5_000, 290_000) == CONTENT[5_000:290_000]
    assert server.count(PATH).ranges == ["bytes=5000-289999", "bytes=45000-289999", "bytes=45001-289999"]


@pytest.mark.parametrize("kind", ["ok", "reset", "close", "less", "ignore_range", "chunked"])
@pytest.mark.parametrize("start", [0, 7_777])
def test_a_stream_has_every_byte_once(server: FaultServer, kind: str, start: int) -> None:
    server.plan(PATH, *[_fault(kind) if kind != "ok" else OK] * 2)
    assert b"".join(Storage(PATIENT).stream(server.url(PATH), start)) == CONTENT[start:]


def test_a_slow_reader_is_not_a_slow_server() -> None:
    content = CONTENT * 20
    settings = StorageSettings(stall_s=0.2, min_bytes_per_s=10_000_000, budget_s=0.6, max_retries=1, backoff_s=0.01)
    with FaultServer({PATH: content}) as server:
        received = bytearray()
        for chunk in Storage(settings).stream(server.url(PATH)):
            received += chunk
            time.sleep(0.25)
        assert received == content
        assert server.count(PATH).requests == 1


def test_what_the_server_asks_for_is_waited_for_within_the_budget(server: FaultServer) -> None:
    url = server.url(PATH)
    server.plan(PATH, fault("status", status=429, retry_after="1"), fault("status", status=503))
    assert Storage(QUICK).read(url, 0, 10) == CONTENT[:10]
    times = server.count(PATH).times
    assert 1.0 <= times[1] - times[0] < 1.5
    assert times[2] - times[1] < 0.5

    server.plan(PATH, fault("status", status=503, retry_after="60"))
    began = time.monotonic()
    with pytest.raises(StorageError, match="asks to wait 60 s"):
        Storage(QUICK).read(url, 0, 10)
    assert time.monotonic() - began < 0.5


def test_retry_after_is_seconds_or_a_date() -> None:
    assert of_status(503, "7").retry_after_s == 7
    assert of_status(503, "Wed, 21 Oct 2015 07:28:00 GMT").retry_after_s == 0
    assert of_status(503, "soon").retry_after_s is None
    in_a_minute = of_status(429, formatdate(time.time() + 60, usegmt=True)).retry_after_s
    assert in_a_minute is not None
    assert 50 < in_a_minute <= 60


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "no such object"), (403, "access is refused"), (401, "credentials"), (400, "status 400")],
)
def test_what_no_retry_helps_is_tried_once(server: FaultServer, url: str, status: int, words: str) -> None:
    server.always(PATH, fault("status", status=status))
    with pytest.raises(StorageError, match=words):
        Storage(QUICK).read(url, 0, 10)
    assert server.count(PATH).requests == 1


def test_bytes_of_two_versions_are_never_mixed(server: FaultServer, url: str) -> None:
    storage = Storage(PATIENT)
    # Within a read, by its tag alone: the size is the same.
    server.plan(PATH, _fault("reset"), fault("changed", content=OTHER))
    with pytest.raises(StorageError, match=r"it has changed while it was in use \(etag"):
        storage.read(url, 0, len(CONTENT))
    # And between two reads.
    assert storage.read(url, 0, 10) == CONTENT[:10]
    server.files[PATH] = OTHER
    with pytest.raises(StorageError, match="it has changed"):
        storage.read(url, 10, 20)
    assert Storage(PATIENT).read(url, 10, 20) == OTHER[10:20]


def test_a_size_tells_versions_apart_where_there_is_no_tag() -> None:
    with FaultServer({PATH: CONTENT}, validators=False) as server:
        storage = Storage(QUICK)
        assert storage.read(server.url(PATH), 0, 10) == CONTENT[:10]
        server.files[PATH] = OTHER[:-1]
        with pytest.raises(StorageError, match="size 300000 became 299999"):
            storage.read(server.url(PATH), 0, 10)


def test_an_answer_without_a_length_that_is_too_short_is_no_end(server: FaultServer) -> None:
    storage = Storage(PATIENT)
    assert storage.size(server.url(PATH)) == len(CONTENT)
    etag = server.etag(CONTENT)
    server.always(PATH, fault("chunked", content=CONTENT[:1000], etag=etag))
    with pytest.raises(StorageError, match="ended before the bytes"):
        storage.read_all(server.url(PATH))
    assert server.count(PATH).requests < 10


def test_a_failed_first_answer_does_not_decide_what_the_object_is(server: FaultServer) -> None:
    storage = Storage(QUICK)
    server.plan(PATH, fault("changed", content=OTHER[:100]))
    with pytest.raises(StorageError, match="it has 100 bytes, but bytes up to 290000"):
        storage.read(server.url(PATH), 0, 290_000)
    assert storage.read(server.url(PATH), 0, 290_000) == CONTENT[:290_000]


def test_few_versions_are_remembered_and_the_others_learnt_anew(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_scale.data.storage._MAX_SEEN", 8)
    storage = Storage(QUICK)
    urls = [f"{server.url(PATH)}?{number}" for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda url: storage.read(url, 5, 9), urls)] == [CONTENT[5:9]] * 100
    assert len(storage._seen) == 8
    server.files[PATH] = OTHER
    assert storage.read(urls[0], 5, 9) == OTHER[5:9]
    assert storage.version(urls[1]).size == len(OTHER)
    known = next(iter(storage._seen))
    with pytest.raises(StorageError, match="it has changed"):
        storage.read(known, 5, 9)


def test_bytes_that_the_reader_refuses_are_fetched_anew(server: FaultServer, url: str) -> None:
    server.plan(PATH, _fault("corrupt"), _fault("corrupt"))
    right = CONTENT[5_000:290_000]
    assert Storage(PATIENT).read(url, 5_000, 290_000, accept=lambda data: data == right) == right
    assert server.count(PATH).requests == 3


def test_sizes_and_ends(server: FaultServer, url: str) -> None:
    storage = Storage(PATIENT)
    empty = url.replace("x.tar", "empty")
    assert (storage.size(url), storage.size(empty)) == (300_000, 0)
    assert storage.read(url, 300_000, 300_000) == b""
    assert storage.read_all(url) == CONTENT
    with pytest.raises(StorageError, match="300000 bytes"):
        storage.read(url, 299_990, 300_001)
    with pytest.raises(StorageError, match="300000 bytes"):
        storage.read(url, 400_000, 400_001)
    with pytest.raises(StorageError, match="larger than the 1000"):
        storage.read_all(url, max_bytes=1000)
    assert storage.read_all(empty) == b""


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.usefixtures("anew")
def test_a_server_that_nobody_runs(scheme: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    use_s3(monkeypatch, "http://127.0.0.1:9")
    url = "http://user:canarypassword@127.0.0.1:9/bucket/x" if scheme == "http" else "s3://bucket/x"
    with pytest.raises(StorageError, match="tried 4 times") as caught:
        Storage(PATIENT).read(url, 0, 10)
    assert not [secret for secret in CANARIES if secret in f"{caught.value!r} {capfd.readouterr()}"]


@pytest.mark.parametrize("seed", range(12))
def test_any_row_of_faults_ends_in_the_bytes_or_an_error(server: FaultServer, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    cache = RangeCache(tmp_path, 20 * 30_100, 30_000) if seed % 2 else None
    storage, num_read = Storage(QUICK, cache), 0
    storage.version(server.url(PATH))  # who has not seen an object before cannot know that it is another one
    kinds = [kind for kind in FAULTS if kind not in ("corrupt", "drip")]
    for _ in range(10):
        server.plan(PATH, *[_fault(rng.choice(kinds), after=rng.randrange(80_000)) for _ in range(rng.randrange(4))])
        start, stop = sorted(rng.choices(range(len(CONTENT) + 1), k=2))
        try:
            data = storage.read(server.url(PATH), start, stop)
        except StorageError:
            continue
        assert data == CONTENT[start:stop]
        num_read += 1
    assert num_read > 3


# Threads and forks


def test_threads_share_a_storage(server: FaultServer, url: str) -> None:
    storage = Storage(replace(QUICK, budget_s=8.0))
    server.plan(
        PATH, *[_fault(kind) for kind in ("reset", "status", "close", "less", "stall", "refuse", "wrong_range")]
    )
    starts = range(0, 280_000, 10_000)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: storage.read(url, start, start + 20_000), starts))
    assert parts == [CONTENT[start : start + 20_000] for start in starts]


def test_a_fork_reads_while_its_parent_does(server: FaultServer, url: str) -> None:
    storage = Storage(StorageSettings(budget_s=5, stall_s=3))
    assert storage.read(url, 0, 10) == CONTENT[:10]
    half_read = storage.stream(url.replace("x.tar", "large"))
    received = bytearray(next(half_read))
    stop = threading.Event()
    failed: list[object] = []

    def read_on() -> None:
        for start in itertools.cycle(range(0, 200_000, 7_001)):
            if stop.is_set():
                return
            if storage.read(url, start, start + 1_000) != CONTENT[start : start + 1_000]:
                failed.append(start)

    thread = threading.Thread(target=read_on)
    thread.start()
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                half_read.close()
                for start in range(number, 100_000, 9_001):
                    assert storage.read(url, start, start + 5_000) == CONTENT[start : start + 5_000]
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    stop.set()
    thread.join(10)
    # A connection of the parent that a child had closed would be silent now, until its stall ends it.
    began = time.monotonic()
    assert storage.read(url, 0, 100_000) == CONTENT[:100_000]
    assert time.monotonic() - began < 1.5
    assert failed == []
    assert bytes(received) + b"".join(half_read) == CONTENT * 50
    assert server.count("/bucket/large").requests == 1


# Secrets


@pytest.mark.parametrize("kind", FAULTS)
def test_no_secret_shows_in_errors_or_the_log(
    server: FaultServer, url: str, kind: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    if url.startswith("http"):
        host = f"{CANARIES[5]}:{CANARIES[4]}@{server.host}"
        url = f"http://{host}{PATH}?X-Amz-Signature={CANARIES[3]}&sig={CANARIES[3]}"
    server.always(PATH, _fault(kind, after=0))
    with pytest.raises(StorageError) as caught:
        Storage(replace(QUICK, budget_s=0.6, stall_s=0.1)).read(url, 0, 10, accept=lambda _: False)
    error = caught.value
    shown = [str(error), repr(error), "".join(traceback.format_exception(error)), repr(vars(error))]
    assert error.__cause__ is None
    assert error.__context__ is None
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.url) == (str(error), error.url)
    # torch's loader makes an error of a worker again from its text alone.
    assert str(type(error)("text")) == "text"
    shown += [*capfd.readouterr(), caplog.text]
    assert not [secret for secret in CANARIES for text in shown if secret in text]


@pytest.mark.parametrize("error", [ValueError, OSError, asyncio.TimeoutError, KeyError])
def test_errors_of_libraries_are_put_into_other_words(error: type[Exception]) -> None:
    reason = describe(error(f"https://a:{CANARIES[4]}@h/x?sig={CANARIES[3]}"), 1.0).reason
    assert not [secret for secret in CANARIES if secret in reason]


# Configuration, and local files


def test_the_configuration_of_fsspec_and_netrc_count(server: FaultServer, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password pw\n")
    script = f"""
        from ldm_scale.data.storage import Storage
        print(len(Storage().read({server.url(PATH)!r}, 0, 1000)))
    """
    environment = os.environ | {
        "FSSPEC_HTTP": '{"headers": {"X-Request": "request"}, "client_kwargs": {"headers": {"X-Session": "session"}}}',
        "NETRC": str(netrc),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("1000\n", "")
    headers = server.count(PATH).headers[0]
    assert (headers["X-Request"], headers["X-Session"]) == ("request", "session")
    assert headers["Authorization"] == "Basic bWU6cHc="
    assert headers["Accept-Encoding"] == "identity"


def test_local_files(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(CONTENT)
    storage = Storage(QUICK)
    for name in (str(path), f"file://{path}"):
        assert storage.size(name) == len(CONTENT)
        assert storage.read(name, 5, 200_000) == CONTENT[5:200_000]
        assert storage.read_all(name) == CONTENT
        assert b"".join(storage.stream(name, 299_999)) == CONTENT[-1:]
    with pytest.raises(StorageError, match="ends at byte 300000"):
        storage.read(str(path), 5, 300_001)
    with pytest.raises(StorageError, match="No such file"):
        storage.read(str(tmp_path / "none"), 0, 1)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(StorageError, match="not a file"):
            storage.read(str(tmp_path / name), 0, 1)
    with pytest.raises(DataError, match="commands are never run"):
        storage.read("pipe:cat x", 0, 1)
