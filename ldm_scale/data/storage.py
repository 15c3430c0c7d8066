"""Bytes of shards, wherever they lie: local files, web servers, S3 and Google Cloud, through one interface.

A read gives exactly the bytes that it was asked for, or raises a StorageError within its budget (data/reading.py). What
an object was when it was first read holds for as long as the process lives and reads fewer than 65,536 others: a later
answer with another ETag (else Last-Modified) or size is an error. No read has bytes of both.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ldm_scale.config.schema import DataConfig
from ldm_scale.data.cache import RangeCache
from ldm_scale.data.failures import describe
from ldm_scale.data.reading import Patience, Reading, StorageError, StorageSettings
from ldm_scale.data.remote import Version, list_objects
from ldm_scale.data.urls import expand_names, local_path, public_name

__all__ = ["Storage", "StorageError", "StorageSettings", "expand"]

_CHUNK = 1 << 20  # bytes of a local file at a time
_MAX_SEEN = 1 << 16  # objects whose version a process remembers


def expand(patterns: Sequence[str], settings: StorageSettings | None = None) -> list[str]:
    """The names that patterns stand for (`expand_names`), with globs of `s3://` and `gs://` looked up there.

    Raises: DataError if a name is not allowed, a pattern matches nothing, or two names are the same; StorageError
        where a bucket cannot be listed.
    """
    limits = settings or StorageSettings()

    def list_remote(pattern: str) -> list[str]:
        patience = Patience(pattern, limits)
        while True:
            try:
                return patience.wait(list_objects(pattern))
            except Exception as error:
                failure = describe(error, limits.stall_s)
            patience.failed(failure)

    return expand_names(patterns, list_remote)


class _LocalFile:
    """A regular file that is open for reading.

    Raises: StorageError wherever the system refuses.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        reason = ""
        try:
            # Not to wait for a writer, where the name is a pipe's.
            self._descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if reason:
            raise StorageError(f"{name}: cannot be opened ({reason}); check the path and your rights", name, 1)
        found = os.fstat(self._descriptor)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            os.close(self._descriptor)
            raise StorageError(f"{name}: not a file; shards are plain files", name, 1)

    def __enter__(self) -> _LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to before `stop`."""
        content, reason = bytearray(), ""
        try:
            while start + len(content) < stop:
                chunk = os.pread(self._descriptor, stop - start - len(content), start + len(content))
                if not chunk:
                    reason = f"it ends at byte {start + len(content)}, but byte {stop} was asked for"
                    break
                content += chunk
        except OSError as error:
            reason = str(error.strerror)
        if reason:
            raise StorageError(f"{self._name}: {reason}; copy it again or index it anew", self._name, 1)
        return bytes(content)


class Storage:
    """Reads bytes by name. Threads may share it, and a fork may inherit it."""

    def __init__(self, settings: StorageSettings | None = None, cache: RangeCache | None = None) -> None:
        self._settings = settings or StorageSettings()
        self._cache = cache
        # No lock guards it: a fork could inherit that locked. Each call of an OrderedDict is atomic with such keys.
        self._seen: OrderedDict[str, Version] = OrderedDict()

    def size(self, url: str) -> int:
        """Size of a file or an object in bytes.

        Raises: StorageError
        """
        path = local_path(url)
        if path is not None:
            with _LocalFile(path) as file:
                return file.size
        size = self.version(url).size
        if size is None:
            raise StorageError(f"{public_name(url)}: the server does not say how large it is; use another", url, 1)
        return size

    def version(self, url: str) -> Version:
        """What a remote object was when this process first read it; it is asked for where that is not known.

        Raises: StorageError
        """
        seen = self._seen.get(url)
        if seen is None:
            reading = Reading(url, 0, 1, None, self._settings, at_most=True)
            for _ in reading:
                pass
            assert reading.seen is not None, "an answer without a version"
            seen = self._learn(url, reading.seen)
        return seen

    def read(self, url: str, start: int, stop: int, accept: Callable[[bytes], bool] | None = None) -> bytes:
        """The bytes from `start` to before `stop`. Those that `accept` refuses are fetched anew, past the cache.

        Raises: StorageError, also if the object ends before `stop`, or `accept` refuses every time.
        """
        assert 0 <= start <= stop, f"bytes {start} to {stop}"
        tries = self._settings.max_mismatches + 1
        for _ in range(tries):
            data = self._read(url, start, stop)
            if accept is None or accept(data):
                return data
            seen = self._seen.get(url)
            if self._cache is not None and seen is not None:
                self._cache.drop(url, seen, start, stop)
        raise StorageError(
            f"{public_name(url)}: bytes {start} to {stop} are not what they should be, {tries} times in a row; the "
            "object is damaged or another one: copy it again or index it anew",
            url,
            tries,
        )

    def read_all(self, url: str, max_bytes: int = 1 << 30) -> bytes:
        """The whole content.

        Raises: StorageError, also if that is more than `max_bytes`.
        """
        content = bytearray()
        for chunk in self.stream(url):
            content += chunk
            if len(content) > max_bytes:
                raise StorageError(f"{public_name(url)}: larger than the {max_bytes} bytes that it may have", url, 1)
        return bytes(content)

    def stream(self, url: str, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` to the end, in chunks of about 1 MiB.

        Raises: StorageError
        """
        path = local_path(url)
        if path is None:
            yield from self._remote(url, start, None)
            return
        with _LocalFile(path) as file:
            for begin in range(start, file.size, _CHUNK):
                yield file.read(begin, min(begin + _CHUNK, file.size))

    def _read(self, url: str, start: int, stop: int) -> bytes:
        path = local_path(url)
        if path is None:
            return b"".join(self._remote(url, start, stop))
        with _LocalFile(path) as file:
            return file.read(start, stop)

    def _remote(self, url: str, start: int, stop: int | None) -> Iterator[bytes]:
        """Bytes from the cache where it has them, from the server and into the cache where not."""
        if self._cache is None:
            return self._fetch(url, start, stop)
        version = self.version(url)
        if version.size is None or not self._cache.holds(url, version) or (stop or start) > version.size:
            return self._fetch(url, start, stop)
        end = version.size if stop is None else stop
        return self._cache.stream(
            url, version, start, end, lambda begin, until: self._fetch(url, begin, until, version)
        )

    def _fetch(self, url: str, start: int, stop: int | None, version: Version | None = None) -> Iterator[bytes]:
        """Bytes from the server, of `version` if that is given."""
        reading = Reading(url, start, stop, version or self._seen.get(url), self._settings, at_most=False)
        yield from reading
        if reading.seen is not None:
            self._learn(url, reading.seen)

    def _learn(self, url: str, seen: Version) -> Version:
        """What is known of the object after a read: an answer that led nowhere says nothing about later ones.

        Raises: StorageError if it was another one before.
        """
        known = self._seen.setdefault(url, seen)
        if len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)
        difference = known.difference(seen)
        if difference:
            raise StorageError(f"{public_name(url)}: it has changed while it was read ({difference})", url, 1)
        return known


def build_storage(data: DataConfig) -> Storage:
    """What reads the shards of a configuration."""
    cache = RangeCache(Path(data.cache_dir), int(data.cache_gib * 2**30)) if data.cache_dir else None
    return Storage(cache=cache)
