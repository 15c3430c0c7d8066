"""Files that a run writes beside its checkpoints. None of them is worth the training.

A full disk or a folder that is read-only for a while leads to a line in the log, with the path. Rows are written whole
or not at all; those that were refused wait in memory and go with the next that are taken.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_scale.telemetry.log import get_logger

MAX_WAITING = 10_000  # rows, some 10 MiB of figures


@contextlib.contextmanager
def side_write(path: Path) -> Iterator[None]:
    """A block that writes a file: the log says so where it could not."""
    try:
        yield
    except OSError as error:
        _refused(path, error, "the run goes on without it")


class RowFile:
    """A file of JSON rows, one a line, that grows at its end; one process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._lost = 0

    def cut(self, keeps: Callable[[dict[str, Any]], bool] = lambda row: True) -> None:
        """Nothing; the file ends before its first row that is not to be kept, and behind a whole row.

        In its place, which a full disk does not prevent.
        """
        with side_write(self.path), contextlib.suppress(FileNotFoundError), self.path.open("r+b") as file:
            end = 0
            for line in file:
                row = _parsed(line)
                if not line.endswith(b"\n") or (row is not None and not keeps(row)):
                    file.truncate(end)
                    break
                end += len(line)

    def append(self, *rows: Mapping[str, Any], durable: bool = False) -> bool:
        """Whether all rows are in the file, those that waited too; `durable` puts them on the disk."""
        has_waited = bool(self._waiting)
        for row in rows:
            self._lost += len(self._waiting) == MAX_WAITING
            self._waiting.append(f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n".encode())
        if not self._waiting:
            return True
        size = None
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                file.write(b"".join(self._waiting))
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # half a row would spoil the one after it
            if not has_waited:
                _refused(self.path, error, "its rows wait in memory, the run goes on")
            return False
        if has_waited:
            lost = f" but for the oldest {self._lost}, which are lost" if self._lost else ""
            get_logger().info(f"{self.path} is written again, with the rows that waited{lost}")
        self._waiting.clear()
        self._lost = 0
        return True


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, oldest first; lines that were cut short or damaged are left out, a missing file has none."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = (_parsed(line) for line in lines if line.endswith(b"\n"))
    return [row for row in rows if row is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _refused(path: Path, error: OSError, meanwhile: str) -> None:
    get_logger().error(
        f"{path} cannot be written ({error.strerror or error}): free space there, or fix its permissions; {meanwhile}"
    )
