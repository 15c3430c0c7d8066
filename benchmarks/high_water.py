"""The kernel's high-water mark of this process's resident memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of malloc.h


def give_back_freed() -> None:
    """Nothing; what glibc holds of freed memory goes back to the system, and what is freed later goes at once.

    Else the marks are of what it keeps: half as much again as is in use, or too little where a network moves into
    memory that was resident before.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    libc.malloc_trim(0)


def set_back_high_water() -> None:
    """Nothing; the mark is what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
