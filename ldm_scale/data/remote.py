"""One answer of one server: a byte range opened over HTTP, S3 or Google Cloud, and what its failure means.

fsspec finds configuration and credentials and owns the event loop. Over HTTP the answer is read here and not by
fsspec's `cat_file`, which takes a whole page for a range where a server ignores ranges, unpacks gzip, and loses what
came when a connection breaks. Nothing here tries twice: data/storage.py does.

A filesystem belongs to the process that made it: a child that closed its parent's connections would take their sockets
out of the epoll set that both share, and the parent would wait for ever. So a fork leaves them alone and opens its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import get_loop
from fsspec.config import apply_config

from ldm_scale.data.failures import Failure, of_status, status_of
from ldm_scale.data.urls import scheme_of

T = TypeVar("T")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_AT_ONCE = 1 << 18  # bytes asked of a stream at a time
_PIECE = 1 << 23  # bytes that are lost, at most, where a range comes in one go

_filesystems: dict[str, Any] = {}  # of this process, by scheme
_left_behind: list[Any] = []  # those of the parents: kept, so that nothing ever closes them


def _leave_to_parent() -> None:
    _left_behind.append(dict(_filesystems))
    _filesystems.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one content of an object from another; None where the server does not say."""

    size: int | None
    etag: str | None = None
    modified: str | None = None

    def difference(self, other: Version) -> str:
        """What two versions disagree about, with both values; "" where nothing."""
        # A server may touch a file that stays the same; the tag, where there is one, is about the content.
        tagged = self.etag is not None and other.etag is not None
        for name in ("etag" if tagged else "modified", "size"):
            ours, others = getattr(self, name), getattr(other, name)
            if ours is not None and others is not None and ours != others:
                return f"{name} {ours} became {others}"
        return ""


class Body:
    """An answer whose bytes are still to come. All methods run on the event loop."""

    def __init__(self, version: Version, left: int | None = None, skip: int = 0, stream: Any = None) -> None:
        self.version = version
        self.num_raw = 0  # bytes that came, wanted or not
        self._left = left  # wanted bytes still to come; None = all until the stream ends
        self._skip = skip  # bytes to throw away first
        self._stream = stream
        self._waited_s = self._in_window = 0.0

    async def _next(self) -> bytes:
        """The stream's next bytes; b"" at its end."""
        raise NotImplementedError  # each kind of server has its own, below

    async def read(self) -> bytes | None:
        """The next wanted bytes, which may be none of those that came; None after the last."""
        if self._left == 0:
            return None
        chunk = await self._next()
        if not chunk:
            if self._left is not None:
                raise Failure(f"the body ended {self._left} bytes too early")
            return None
        self.num_raw += len(chunk)
        skipped = min(self._skip, len(chunk))
        self._skip -= skipped
        chunk = chunk[skipped:] if self._left is None else chunk[skipped : skipped + self._left]
        if self._left is not None:
            self._left -= len(chunk)
        return chunk

    async def fill(self, buffer: bytearray, num_bytes: int, stall_s: float, min_bytes_per_s: float) -> bool:
        """Whether more may come after the `num_bytes` or fewer that this has added to the buffer.

        Raises: TimeoutError if nothing comes for `stall_s`, Failure if over that time too little does.
        """
        while len(buffer) < num_bytes:
            began, raw = time.monotonic(), self.num_raw
            async with asyncio.timeout(stall_s):
                chunk = await self.read()
            if chunk is None:
                return False
            buffer += chunk
            # Time in which nobody reads is not the server's.
            self._waited_s += time.monotonic() - began
            self._in_window += self.num_raw - raw
            if self._waited_s >= stall_s:
                if self._in_window < min_bytes_per_s * self._waited_s:
                    raise Failure(f"{self._in_window / self._waited_s:.0f} bytes/s, less than {min_bytes_per_s:.0f}")
                self._waited_s = self._in_window = 0.0
        return True

    def close(self) -> None:
        """Nothing; a connection whose answer was not read to its end is given up."""
        if self._stream is not None:
            with suppress(Exception):
                self._stream.close()


def _take_buffered(content: aiohttp.StreamReader) -> bytes:
    """What has come of an answer that broke: aiohttp tells of the break first and would never give it."""
    kept = b"".join(content._buffer)[content._buffer_offset :]
    content._buffer.clear()
    content._buffer_offset = 0
    return kept


class _HttpBody(Body):
    async def _next(self) -> bytes:
        try:
            return bytes(await self._stream.content.readany())
        except aiohttp.ClientError:
            kept = _take_buffered(self._stream.content)
            if not kept:
                raise
            return kept


class _S3Body(Body):
    async def _next(self) -> bytes:
        try:
            return bytes(await self._stream.read(_AT_ONCE))
        except Exception:
            content = getattr(self._stream.raw_stream, "content", None)
            kept = _take_buffered(content) if isinstance(content, aiohttp.StreamReader) else b""
            if not kept:
                raise
            return kept


class _Bytes(Body):
    """What a filesystem gave in one go."""

    async def _next(self) -> bytes:
        chunk, self._stream = self._stream or b"", None
        return chunk

    def close(self) -> None:
        self._stream = None


def run(coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The coroutine's result, from fsspec's event loop.

    Raises: TimeoutError after `timeout_s`; what the coroutine raises.
    """
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout_s), get_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # a signal's exception in this thread leaves nothing running in the other
        raise


def filesystem(scheme: str) -> Any:
    """This process's fsspec filesystem for a scheme, with the user's fsspec configuration; for use on the event loop.

    Raises: Failure if its package is missing.
    """
    found = _filesystems.get(scheme)
    if found is not None:
        return found
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError:
        kind = None
    if kind is None:
        raise Failure(f"{scheme}:// needs a package that is not installed: pip install {_PACKAGES[scheme]}", True)
    options = apply_config(kind, {})
    if scheme in ("http", "https"):
        # Proxies and ~/.netrc count, as they do for curl.
        options["client_kwargs"] = {"trust_env": True, **options.get("client_kwargs", {})}
    elif scheme == "s3":
        # Time limits and retries are ours: three layers of them would multiply.
        limits = {"connect_timeout": 600, "read_timeout": 600, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {"max_pool_connections": 64, **options.get("config_kwargs", {}), **limits}
    made = kind(asynchronous=True, loop=get_loop(), skip_instance_cache=True, **options)
    if scheme == "s3":
        made.retries = 1
    return _filesystems.setdefault(scheme, made)  # of two threads one wins; the other's has no connection yet


async def _close_all() -> None:
    for made in _filesystems.values():
        with suppress(Exception):
            if getattr(made, "_s3creator", None) is not None:
                await made._s3creator.__aexit__(None, None, None)
            elif getattr(made, "_session", None) is not None:
                await made._session.close()


@atexit.register
def close_filesystems() -> None:
    """Nothing; the connections of this process are closed. The next read opens others, by the configuration then."""
    if _filesystems:
        with suppress(Exception):
            run(_close_all(), 1.0)
        _filesystems.clear()


async def open_range(url: str, start: int, stop: int, seen: Version | None, connect_s: float, stall_s: float) -> Body:
    """The answer that holds bytes from `start` on, up to `stop` or fewer; `stop` -1 is the object's end.

    Raises: Failure, or whatever the libraries below raise; `failures.describe` puts that into words.
    """
    scheme = scheme_of(url)
    async with asyncio.timeout(connect_s + stall_s):
        if scheme in ("http", "https"):
            return await _open_http(filesystem(scheme), url, start, stop, connect_s)
        if scheme == "s3":
            return await _open_s3(filesystem(scheme), url, start, stop)
    return await _open_whole(filesystem(scheme), url, start, stop, seen, connect_s + stall_s)


def _range(start: int, stop: int) -> str:
    return f"bytes={start}-" if stop < 0 else f"bytes={start}-{stop - 1}"


def _span(content_range: str, start: int) -> tuple[int, int | None]:
    """(number of bytes in an answer, size of the object) by its Content-Range."""
    match = _CONTENT_RANGE.fullmatch(content_range)
    if match is None or match[1] is None or int(match[1]) != start or int(match[2]) < start:
        raise Failure(f"the answer to a request from byte {start} on has the Content-Range {content_range[:80]!r}")
    return int(match[2]) - start + 1, None if match[3] == "*" else int(match[3])


async def _open_http(fs: Any, url: str, start: int, stop: int, connect_s: float) -> Body:
    session = await fs.set_session()
    options = {**fs.kwargs}
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity", "Range": _range(start, stop)}
    options |= {"raise_for_status": False, "auto_decompress": False, "read_bufsize": 1 << 20}
    options["timeout"] = aiohttp.ClientTimeout(total=None, connect=connect_s)
    response = await session.get(fs.encode_url(url), **options)
    try:
        return _http_body(response, start, stop)
    except BaseException:
        response.close()
        raise


def _http_body(response: aiohttp.ClientResponse, start: int, stop: int) -> Body:
    """The body of an answer.

    Raises: Failure if it is not the bytes that were asked for.
    """
    headers = response.headers
    content_range = headers.get("Content-Range", "")
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    if response.status == 416:
        match = _CONTENT_RANGE.fullmatch(content_range)
        if match is not None and match[3] != "*" and int(match[3]) <= start:
            response.close()
            return _Bytes(Version(int(match[3]), etag, modified))
    if response.status not in (200, 206):
        raise of_status(response.status, headers.get("Retry-After"))
    if headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        raise Failure("the server sends it with a Content-Encoding; shards are served as they are stored", True)
    if headers.get("Content-Type", "").lower().startswith("text/html"):
        raise Failure("the server answers with an HTML page in its place")
    length = int(headers["Content-Length"]) if headers.get("Content-Length", "").isdecimal() else None
    if response.status == 206:
        num_bytes, size = _span(content_range, start)
        if length not in (None, num_bytes):
            raise Failure(f"the answer has {length} bytes, but its Content-Range {num_bytes}")
        left = num_bytes if stop < 0 else min(num_bytes, stop - start)
        return _HttpBody(Version(size, etag, modified), left, 0, response)
    # The server ignores ranges and sends all of it.
    if length is None and "chunked" not in headers.get("Transfer-Encoding", "").lower():
        raise Failure("the answer has no length, so its end could not be told from a break", True)
    end = stop if stop >= 0 else length
    if length is not None and end is not None:
        end = min(end, length)
    return _HttpBody(Version(length, etag, modified), None if end is None else max(0, end - start), start, response)


async def _open_s3(fs: Any, url: str, start: int, stop: int) -> Body:
    bucket, key, _ = fs.split_path(url)
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=_range(start, stop))
    except OSError as error:
        if status_of(error) != 416:
            raise
        head = await fs._call_s3("head_object", Bucket=bucket, Key=key)
        return _Bytes(Version(int(head["ContentLength"]), head.get("ETag"), str(head["LastModified"])))
    num_bytes, size = _span(answer.get("ContentRange", ""), start)
    if answer["ContentLength"] != num_bytes:
        answer["Body"].close()
        raise Failure(f"the answer has {answer['ContentLength']} bytes, but its Content-Range {num_bytes}")
    left = num_bytes if stop < 0 else min(num_bytes, stop - start)
    return _S3Body(Version(size, answer.get("ETag"), str(answer["LastModified"])), left, 0, answer["Body"])


async def _open_whole(fs: Any, url: str, start: int, stop: int, seen: Version | None, timeout_s: float) -> Body:
    """The range in one go, by what every fsspec filesystem can do; the version is looked up beside it."""

    async def version() -> Version:
        fs.invalidate_cache()
        info = await asyncio.wait_for(fs._info(url), timeout_s)
        etag = info.get("generation") or info.get("etag") or info.get("ETag")
        modified = info.get("updated") or info.get("LastModified")
        return Version(info["size"], None if etag is None else str(etag), None if modified is None else str(modified))

    before = seen or await version()
    assert before.size is not None
    stop = min(before.size, start + _PIECE, before.size if stop < 0 else stop)
    if start >= stop:
        return _Bytes(before)
    data = await asyncio.wait_for(fs._cat_file(url, start=start, end=stop), timeout_s)
    after = await version()
    if difference := before.difference(after):
        raise Failure(f"it has changed while it was in use ({difference})", is_final=seen is not None)
    return _Bytes(after, stop - start, 0, data)


async def list_objects(pattern: str) -> list[str]:
    """The names of all objects that a glob matches now."""
    fs = filesystem(scheme_of(pattern))
    fs.invalidate_cache()
    found = await fs._glob(pattern, detail=True)
    return [fs.unstrip_protocol(name) for name, info in found.items() if info["type"] == "file"]
