"""One read of a remote object over as many connections as it takes, within a time that is known beforehand.

Every connection breaks at some point of a long run; the next one goes on at the byte where the last one broke. What
came is never taken from two versions of an object.

A read may take `budget_s` longer than its bytes take at `min_bytes_per_s`; tries, pauses and slow answers all count,
the time in which its reader does something else does not. That bounds a server that drips one byte a second, and lets
a long stream go on for as long as it moves.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fsspec.asyn import get_loop

from ldm_scale import faults
from ldm_scale.data.failures import Failure, describe
from ldm_scale.data.remote import Body, Version, open_range, run
from ldm_scale.data.urls import public_name
from ldm_scale.errors import DataError
from ldm_scale.telemetry.log import say_once

T = TypeVar("T")
_CHUNK = 1 << 20  # bytes handed from the event loop to the reading thread at a time
_jitter = random.SystemRandom()  # forked workers share the state of any other generator and would retry in step


class StorageError(DataError):
    """Bytes that could not be read: the public name, what happened, how often it was tried."""

    def __init__(self, message: str, url: str = "", num_tries: int = 0) -> None:
        super().__init__(message)
        self.url = public_name(url)
        self.num_tries = num_tries


@dataclass(frozen=True)
class StorageSettings:
    """How long a remote read may take, and how often it is tried."""

    connect_s: float = 10.0  # until a connection stands
    stall_s: float = 30.0  # without any byte; also the window in which the speed is measured
    min_bytes_per_s: float = 32 * 1024  # a slower connection is given up and continued by another
    budget_s: float = 120.0  # what a read may take beyond the time of its bytes at that speed
    max_retries: int = 8  # in a row, without progress
    backoff_s: float = 0.5  # pause before the first retry, doubled before every other; half of it is random
    max_backoff_s: float = 20.0
    max_mismatches: int = 2  # times that bytes which the reader refuses are fetched anew


class Patience:
    """The clock of one read: what it has spent, and whether there is another try."""

    def __init__(self, url: str, settings: StorageSettings) -> None:
        self._url, self._settings = url, settings
        self._num_bytes = self._num_failed = self._tries = 0
        self._spent_s = 0.0

    def _left_s(self) -> float:
        return self._settings.budget_s + self._num_bytes / self._settings.min_bytes_per_s - self._spent_s

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result.

        Raises: Failure when the budget is spent; what the coroutine raises.
        """
        began = time.monotonic()
        try:
            return run(work, max(0.0, self._left_s()))
        except TimeoutError:
            if time.monotonic() - began >= self._left_s():
                raise Failure("too slow, its time is over") from None
            raise
        finally:
            self._spent_s += time.monotonic() - began

    def came(self, num_bytes: int) -> None:
        """Nothing; so many bytes came, which pays for time and makes retries count anew."""
        self._num_bytes += num_bytes
        self._num_failed = 0

    def failed(self, failure: Failure) -> None:
        """Nothing, after the pause before the next try.

        Raises: StorageError if there is none.
        """
        settings = self._settings
        self._tries += 1
        self._num_failed += 1
        pause_s = min(settings.max_backoff_s, settings.backoff_s * 2.0 ** (self._num_failed - 1))
        pause_s = max(pause_s * _jitter.uniform(0.5, 1.0), failure.retry_after_s or 0.0)
        if failure.is_final or self._num_failed > settings.max_retries or pause_s >= self._left_s():
            self._give_up(failure, pause_s)
        kind = re.sub(r"[\d.]+", "", failure.reason)
        say_once(f"storage {kind}", f"{public_name(self._url)}: {failure.reason}; trying again")
        time.sleep(pause_s)
        self._spent_s += pause_s

    def _give_up(self, failure: Failure, pause_s: float) -> None:
        after = ""
        if not failure.is_final:
            tries = "once" if self._tries == 1 else f"{self._tries} times"
            after = f"; tried {tries} in {self._spent_s:.1f} s"
            if failure.retry_after_s is not None and pause_s >= self._left_s():
                after += f", and the server asks to wait {failure.retry_after_s:.0f} s"
            after += ": check the server and the network, or raise the storage budget"
        raise StorageError(f"{public_name(self._url)}: {failure.reason}{after}", self._url, self._tries)


class Reading:
    """Where a read of bytes `start` to before `stop` (None: to the end) has got to."""

    def __init__(
        self, url: str, start: int, stop: int | None, seen: Version | None, settings: StorageSettings, at_most: bool
    ) -> None:
        self.seen = seen  # the version that all bytes are from; None = not known yet
        self._url, self._stop, self._settings, self._at_most = url, stop, settings, at_most
        self._position = start
        self._patience = Patience(url, settings)
        self._buffer = bytearray()
        self._body: Body | None = None
        self._failure: Failure | None = None
        self._was_open = False
        self._process = os.getpid()

    def __iter__(self) -> Iterator[bytes]:
        """The bytes in order.

        Raises: StorageError
        """
        try:
            while not self._is_done():
                if self._failure is not None:
                    self._patience.failed(self._failure)
                    self._failure = None
                self._failure = self._try()
                if self._buffer:
                    chunk = bytes(self._buffer)
                    self._buffer.clear()
                    self._position += len(chunk)
                    yield chunk
        finally:
            # Also where this is collected before its end, but never by a fork of its process.
            if os.getpid() == self._process:
                self._close()

    def _is_done(self) -> bool:
        if self._stop is not None and self._position >= self._stop:
            return True
        if not self._was_open or self._body is not None or self._failure is not None or self.seen is None:
            return False
        return self.seen.size is not None and self._position >= self.seen.size

    def _try(self) -> Failure | None:
        """What went wrong, if anything; the bytes that came are in the buffer either way."""
        limits, more, failure = self._settings, False, None
        try:
            if self._body is None:
                faults.reach("data.fetch")
                end = -1 if self._stop is None else self._stop
                opening = open_range(self._url, self._position, end, self.seen, limits.connect_s, limits.stall_s)
                self._body = self._patience.wait(opening)
                self._check(self._body.version)
                self._was_open = True
            more = self._patience.wait(self._body.fill(self._buffer, _CHUNK, limits.stall_s, limits.min_bytes_per_s))
        except Exception as error:
            failure = describe(error, limits.stall_s)
        if self._body is not None and self._buffer:
            self._patience.came(self._body.num_raw)
            self._body.num_raw = 0
        if not more:
            self._close()
        if not more and failure is None and self.seen is not None and self.seen.size is None and self._stop is None:
            self.seen = replace(self.seen, size=self._position + len(self._buffer))  # a body that told no length
        if not more and failure is None and not self._buffer and not self._is_done():
            failure = Failure("the answer ended before the bytes that were asked for")
        return failure

    def _check(self, version: Version) -> None:
        """Nothing.

        Raises: Failure if this is another version than before, or one that ends too early.
        """
        if self.seen is None:
            self.seen = version
        elif difference := self.seen.difference(version):
            raise Failure(f"it has changed while it was in use ({difference}); restore it, or index it anew", True)
        size, stop = version.size, self._stop
        if size is not None and not self._at_most and (self._position if stop is None else stop) > size:
            raise Failure(
                f"it has {size} bytes, but bytes up to {self._position if stop is None else stop} were asked for; it "
                "was changed or copied in part: copy it again or index it anew",
                True,
            )

    def _close(self) -> None:
        if self._body is not None:
            get_loop().call_soon_threadsafe(self._body.close)
            self._body = None
