"""The samples of a tar that is read once from front to back, through webdataset's own stages, with its faults told.

`tarfile`, on which those stand, takes a damaged header or a missing end for the end, and webdataset keeps the rest of a
sample as if it were whole. So what they read is watched: `tarfile` gets a block at a time and never reads ahead, by
which the last block says why it stopped. A fault ends the tar; the sample that was being read is lost with it, and
what follows is lost uncounted. No content stops the caller or takes more memory than the largest member may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from ldm_scale.data.policy import SkippedSample
from ldm_scale.data.scan import (
    BAD_NAME,
    COMPRESSED,
    CUT_MEMBER,
    EMPTY_FILE,
    NO_END,
    NO_HEADER,
    NOT_A_TAR,
    REPEATED_MEMBER,
    SIGNATURES,
    ZEROS,
    printable,
)
from ldm_scale.data.shards import RawSample
from ldm_scale.data.sidecar import BLOCK
from ldm_scale.data.storage import StorageError
from ldm_scale.data.tar_header import parse_header
from ldm_scale.telemetry.log import say_once

MAX_MEMBER = 1 << 28  # bytes from one member to the end of the next, which are in memory at once
# Reasons that only a stream has.
NOT_READ = "shard cannot be read"
NO_SAMPLE = "no sample in the tar"
TOO_LARGE = f"member of more than {MAX_MEMBER >> 20} MiB"
ALL = "(all of it)"  # stands for the sample where none was begun


class _Fault(Exception):
    """Where a tar cannot be read on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason  # webdataset changes the message


class _Watched:
    """A stream of bytes as a file that gives one block at a time and remembers the last."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.block = b""  # the last that was read; shorter at the end of the stream
        self.num_bytes = 0  # read since a member was complete
        self._chunks = iter(chunks)
        self._chunk, self._at = b"", 0

    def read(self, size: int = BLOCK) -> bytes:
        """The next block, whatever size is asked for: `tarfile` asks again for what is missing.

        Raises: _Fault if the member is too large, or the bytes cannot be had.
        """
        while len(self._chunk) - self._at < BLOCK and (more := self._next()):
            self._chunk, self._at = self._chunk[self._at :] + more, 0
        self.block = self._chunk[self._at : self._at + BLOCK]
        self._at += len(self.block)
        self.num_bytes += len(self.block)
        if self.num_bytes > MAX_MEMBER:
            raise _Fault(TOO_LARGE)
        return self.block

    def check_beginning(self) -> None:
        """Nothing, if a tar begins here; `read` gives its first block again.

        Raises: _Fault otherwise.
        """
        first = self.read()
        self._at -= len(first)
        if not first:
            raise _Fault(EMPTY_FILE)
        if parse_header(first) is None:
            raise _Fault(COMPRESSED if first.startswith(SIGNATURES) else NOT_A_TAR)

    def check_end(self) -> None:
        """Nothing, if `tarfile` took the end for the end: zeros, and nothing else follows.

        Raises: _Fault otherwise.
        """
        if len(self.block) < BLOCK:
            raise _Fault(NO_END)
        if self.block.strip(b"\0"):
            raise _Fault(NO_HEADER)
        rest = self._chunk[self._at :]
        while rest:
            if rest.strip(b"\0"):
                raise _Fault(ZEROS)
            rest = self._next()

    def _next(self) -> bytes:
        """More of the stream, b"" at its end.

        Raises: _Fault if it cannot be had.
        """
        try:
            return next(self._chunks, b"")
        except StorageError as error:
            say_once(str(error), str(error))
            raise _Fault(NOT_READ) from None


def read_samples(chunks: Iterable[bytes], stem: str, shard: str) -> Iterator[RawSample | SkippedSample]:
    """The samples of a tar of these bytes, with all their members, and a record for each that cannot be used.

    A fault of the tar is the last record, under the name of the sample that was begun last. Keys begin with the shard's
    `stem`; `shard` is its name for records.
    """
    watched, spoiled = _Watched(chunks), list[str]()
    name = ""  # of the sample that was begun last
    num_samples = 0

    def members() -> Iterator[dict[str, Any]]:
        nonlocal name
        for member in tar_file_iterator(watched):
            watched.num_bytes = 0
            name = base_plus_ext(member["fname"])[0] or name
            yield {**member, "__url__": shard}
        watched.check_end()

    def repeated(error: Exception) -> bool:
        spoiled.append(REPEATED_MEMBER)
        return True  # goes on with the sample's next member

    try:
        watched.check_beginning()
        for sample in group_by_keys(members(), handler=repeated):
            num_samples += 1
            key = str(sample["__key__"])
            reason = BAD_NAME if not key.isprintable() else spoiled[0] if spoiled else None
            spoiled.clear()
            full_key = f"{stem}/{printable(key)}"
            if reason is None:
                yield {**{name: member for name, member in sample.items() if name != "__url__"}, "__key__": full_key}
            else:
                yield SkippedSample(full_key, reason, shard)
        if num_samples == 0:
            raise _Fault(NO_SAMPLE)
    except _Fault as fault:
        yield SkippedSample(f"{stem}/{printable(name) or ALL}", fault.reason, shard)
    except Exception:  # tarfile raises all kinds of errors for headers that make no sense
        reason = CUT_MEMBER if len(watched.block) < BLOCK else NO_HEADER
        yield SkippedSample(f"{stem}/{printable(name) or ALL}", reason, shard)
