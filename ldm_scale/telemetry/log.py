"""The project's log: short lines on stderr, from rank 0; from the other ranks only what is wrong.

Standard output belongs to `--json` and to nothing else. Lines go through tqdm, which lifts a progress bar out of the
way and puts it back below: written directly, they would tear it apart.
"""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from ldm_scale.redaction import public_urls

_NAME = "ldm_scale"
_said: set[str] = set()


class _BesideProgressBars(logging.Handler):
    """Writes each record as one line to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(public_urls(self.format(record)), file=sys.stderr)
            sys.stderr.flush()
        except Exception:  # a full disk or a closed pipe must not stop training: logging's own way to report it
            self.handleError(record)


def get_logger(rank: int | None = None) -> logging.Logger:
    """The project's logger; `rank` makes it that rank's, None leaves it as it is (at first rank 0's)."""
    logger = logging.getLogger(_NAME)
    ours = [handler for handler in logger.handlers if isinstance(handler, _BesideProgressBars)]
    if ours and rank is None:
        return logger
    rank = rank or 0
    handler = _BesideProgressBars()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    for old in ours:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # The root logger belongs to others (DeepSpeed and absl put handlers there), who would print every line again.
    logger.propagate = False
    return logger


def shows_progress() -> bool:
    """Whether progress bars belong on this process's stderr: they are information, so on rank 0 only."""
    return get_logger().isEnabledFor(logging.INFO)


def say_once(key: str, message: str) -> None:
    """Logs `message` unless something was said under `key` before in this process."""
    if key not in _said:
        _said.add(key)
        get_logger().info(message)
