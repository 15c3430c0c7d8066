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
from typing import Any, TypeVar

from ldm_scale.telemetry.log import get_logger

MAX_WAITING = 10_000  # rows, some 10 MiB of figures
T = TypeVar("T")


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

        In its place, which a full disk does not prevent. A damaged line stays, and the log says where.
        """
        damaged, end = [], 0
        with side_write(self.path), contextlib.suppress(FileNotFoundError), self.path.open("r+b") as file:
            for number, line in enumerate(file, start=1):
                is_kept = _checked(line, keeps)
                if not line.endswith(b"\n") or is_kept is False:
                    file.truncate(end)
                    break
                if is_kept is None:
                    damaged.append(number)
                end += len(line)
        if damaged:
            more = f" and {len(damaged) - 1} more are" if len(damaged) > 1 else " is"
            get_logger().warning(f"{self.path}: line {damaged[0]}{more} damaged and left out; look at the disk")

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


def read_rows(path: Path, check: Callable[[dict[str, Any]], object] = lambda row: None) -> list[dict[str, Any]]:
    """Rows of a file, oldest first; a missing file has none.

    Lines that were cut short or damaged are left out, and those in which `check` does not find what it looks for.
    """
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        check(row)
        rows.append(row)

    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                _checked(line, add)
    return rows


def read_record(path: Path, check: Callable[[dict[str, Any]], T]) -> T | None:
    """What the check says of the object in a JSON file; None if that is missing, damaged or lacks what it looks for."""
    with contextlib.suppress(OSError):
        return _checked(path.read_bytes(), check)
    return None


def _checked(line: bytes, check: Callable[[dict[str, Any]], T]) -> T | None:
    """What the check says of the object that the text is; None if it is damaged."""
    try:
        row = json.loads(line)
        return check(row) if isinstance(row, dict) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _refused(path: Path, error: OSError, meanwhile: str) -> None:
    get_logger().error(
        f"{path} cannot be written ({error.strerror or error}): free space there, or fix its permissions; {meanwhile}"
    )
