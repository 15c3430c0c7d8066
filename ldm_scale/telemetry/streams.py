"""Standard streams that a full disk or a reader that has gone cannot turn into an error.

Python keeps what it could not write and fails again at every later line, in whatever line of whichever library comes
next, and once more at its end, where any exit status becomes 120. What is said to people is not worth a training.
"""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Enduring(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        whole = memoryview(data).nbytes
        try:
            # None where the other end reads too slowly and does not let us wait for it.
            return super().write(data) or whole
        except OSError:
            return whole


def enduring(stream: TextIO) -> TextIO:
    """A stream to the same place that loses what cannot be written, line by line; another's stand-in stays as it is."""
    if stream is None or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    raw = _Enduring(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)
