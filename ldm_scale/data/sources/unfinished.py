"""A data set while it is made: whose request it answers, which shards are finished, and that one process makes it.

All of that lies in a folder of its own inside the data set's, which goes when the manifest is there. A shard is
finished when its record lies there: tar and sidecar were on the disk before. So the same command goes on where a killed
one ended, and a shard that was being written is written again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ldm_scale.data.indexing import write_json
from ldm_scale.data.manifest import MANIFEST_NAME, STATE_NAME
from ldm_scale.data.shard_files import remove_abandoned, sync
from ldm_scale.errors import DataError

MAX_NAMED = 100

_BEGUN = "request.json"
_WAIT_S = 3.0  # the workers of a killed process need a moment to notice


@dataclass
class Record:
    """What became of the items of one shard."""

    split: str
    index: int  # of the shard in its split
    num_items: int
    row: dict[str, Any] | None = None  # of the manifest; None where no item could be used
    left_out: dict[str, int] = field(default_factory=dict)  # items that could not be used, by reason
    names: list[tuple[int, str]] = field(default_factory=list)  # number among all items, and why; the first ones

    def leave_out(self, number: int, name: str, reason: str) -> None:
        """Nothing; an item that cannot be used is counted, and named if there is room."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        if len(self.names) < MAX_NAMED:
            # The name of a file need not be UTF-8.
            self.names.append((number, f"{name}: {reason}".encode("utf-8", "replace").decode("utf-8")))


class Unfinished:
    """The data set in the folder `out` while it is made. For the block of `alone` it is this process's."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._is_new = not out.exists()
        self._state = out / STATE_NAME

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A block in which no other process makes this data set. Workers forked in it hold the lock too.

        Raises: DataError if another process makes it.
        """
        give_up_at = time.monotonic() + _WAIT_S
        while (lock := self._try_lock(give_up_at)) is None:
            time.sleep(0.05)
        with lock:
            yield

    def _try_lock(self, give_up_at: float) -> BinaryIO | None:
        """The lock, held by this process as long as it is open; None if it must be tried again.

        Raises: DataError if another process holds it for too long, or the file system knows no locks.
        """
        self._state.mkdir(parents=True, exist_ok=True)
        path = self._state / "lock"
        try:
            lock = path.open("ab")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass  # who had it has finished, or given up, and removed it
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                raise DataError(
                    f"{self.out}: another process is preparing this data set; wait for it, or end it and run the same "
                    "command again"
                ) from None
        return None

    def begin(self, request: dict[str, Any], made_with: dict[str, str]) -> None:
        """Nothing; the folder is for this request, and what killed processes left half-written is gone.

        Raises: DataError if it was begun with other versions, whose shards would not fit.
        """
        begun = read_begun(self.out)
        if begun is None:
            write_json(self._state / _BEGUN, {"request": request, "made_with": made_with})
            sync(self._state / _BEGUN)
        elif begun["made_with"] != made_with:
            raise DataError(
                f"{self.out}: begun with {_versions(begun['made_with'])}, now it is {_versions(made_with)}; go on with "
                "the same versions, or remove the folder"
            )
        self.remove_partial_files()

    def remove_partial_files(self) -> None:
        """Nothing; half-written files are gone."""
        for folder in (self.out, self._state):
            remove_abandoned(folder, alone=True)

    def _path(self, split: str, index: int) -> Path:
        """Where the record of a shard lies."""
        return self._state / f"{split}-{index:06d}.json"

    def find(self, split: str, index: int) -> Record | None:
        """The record of a shard that is finished, None if it is not, or is no longer whole."""
        try:
            record = Record(**json.loads(self._path(split, index).read_bytes()))
            row = record.row
            if row is not None and (
                (self.out / row["file"]).stat().st_size != row["bytes"] or not (self.out / row["index"]).exists()
            ):
                return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return replace(record, names=[(number, text) for number, text in record.names])

    def finish(self, record: Record) -> None:
        """Nothing; the shard of the record, which lies there with its sidecar, is finished for good."""
        if record.row is not None:
            sync(self.out / record.row["index"])
            sync(self.out)
        write_json(self._path(record.split, record.index), asdict(record))

    def publish(self, manifest: dict[str, Any]) -> None:
        """Nothing; the data set is complete."""
        write_json(self.out / MANIFEST_NAME, manifest)
        sync(self.out / MANIFEST_NAME)
        sync(self.out)
        remove_state(self.out)

    def discard(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        """Nothing; the shards of these rows of the manifest are gone, and if no other is there, everything."""
        for row in rows:
            (self.out / row["file"]).unlink(missing_ok=True)
            (self.out / row["index"]).unlink(missing_ok=True)
        self.remove_partial_files()
        if [entry.name for entry in self.out.iterdir()] == [STATE_NAME]:
            remove_state(self.out)
            if self._is_new:
                with suppress(OSError):  # another process has begun there
                    self.out.rmdir()


def read_begun(out: Path) -> dict[str, Any] | None:
    """What a data set that is not complete was begun for: "request" and "made_with"; None if none was begun.

    Raises: DataError if that cannot be read.
    """
    path = out / STATE_NAME / _BEGUN
    try:
        begun = json.loads(path.read_bytes())
        return {key: begun[key] for key in ("request", "made_with")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove the folder {out}") from None


def remove_state(out: Path) -> None:
    """Nothing; what was known of a data set while it was made is gone."""
    shutil.rmtree(out / STATE_NAME, ignore_errors=True)


def _versions(made_with: dict[str, str]) -> str:
    """Packages and their versions in a few words."""
    return ", ".join(f"{package} {version}" for package, version in made_with.items())
