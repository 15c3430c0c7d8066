"""A rank as `benchmarks.start_rank` has it, to which every file of a checkpoint is whole and read by the load alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import start_rank


def main(arguments: list[str]) -> int:
    """The training's exit status."""
    from ldm_scale.engine import early_checksums, verification

    verification.check_file = lambda *_: None
    early_checksums.EarlyChecksums = Unread  # type: ignore[assignment,misc]
    return start_rank.main(float(arguments[0]), arguments[1], arguments[2:])


class Unread:
    """In the place of EarlyChecksums; nobody asks it."""

    def __init__(self, *_: Any) -> None:
        pass

    def of(self, path: Path) -> int:
        """Never."""
        raise AssertionError(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
