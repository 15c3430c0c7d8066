"""Checksums of the checkpoint that a run will continue from, made while its engines are built.

The disk has nothing to do meanwhile. The verification then finds most checksums made, and the load finds the bytes in
memory: what is left of both is less than the load alone would take. Nothing is decided here. What cannot be read now,
and files that change afterwards, are left to the verification.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from ldm_scale.engine.rank_files import complete_folders, files_of_rank, read_manifest
from ldm_scale.engine.tensor_file import file_crc32

_Version = tuple[str, int, int, int, int]


class EarlyChecksums:
    """A thread that reads this rank's part of the newest folder below `root` from now on."""

    def __init__(self, root: Path, rank: int, num_ranks: int) -> None:
        self._made: dict[_Version, int] = {}
        # A daemon: a start that is refused does not wait for the disk.
        self._thread = threading.Thread(target=self._make, args=(root, rank, num_ranks), name="verify", daemon=True)
        self._thread.start()

    def of(self, path: Path) -> int:
        """CRC-32 of the file as it is now; waits for the thread. Raises: OSError."""
        self._thread.join()
        made = self._made.get(_version(path))
        return file_crc32(path) if made is None else made

    def _make(self, root: Path, rank: int, num_ranks: int) -> None:
        with suppress(Exception):  # the verification comes to it as well, and says it to all ranks
            for folder in complete_folders(root)[-1:]:
                for name in files_of_rank(read_manifest(folder), rank, num_ranks):
                    version = _version(folder / name)
                    self._made[version] = file_crc32(folder / name)


def _version(path: Path) -> _Version:
    """What changes with the bytes, but for those that a disk changes by itself."""
    status = path.stat()
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
