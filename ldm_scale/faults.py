"""Faults on request at named points of a run, so that what a run survives can be shown and not only said.

LDM_FAULTS holds rules, separated by ";", each an action with its conditions:

    LDM_FAULTS="kill:at=save.write,rank=1,nth=3; sleep:at=step.forward,seconds=5"

`at` is a point (POINTS), `rank` the rank that it happens on (all without it), `nth` the passage of that point from
which on it happens (1), `times` how often (1). Without the variable a point costs a look at an empty tuple. A run that
has it says so once per rule.

LDM_FAULTS=/a/path names a file with the rules instead. It is read again whenever it was replaced, so that a fault can
be ordered while a run goes on; passages then count from the reading on. A file that is not there has no rules.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_scale.errors import ConfigError

VARIABLE = "LDM_FAULTS"
POINTS = (
    "data.fetch",  # bytes of a shard are about to be read
    "data.batch",  # a micro-batch is about to be taken from the loader
    "step.input",  # with the pixels of a micro-batch
    "step.forward",
    "step.loss",  # with the loss
    "step.gradients",  # with a gradient, before the optimizer's step
    "step.latents",  # with the latents of a micro-batch
    "step.update",
    "step.reduce",  # the metrics' reduction is about to begin
    "weights",  # with a weight that computes, between steps
    "save.begin",
    "save.write",  # a rank's file is open; each tensor passes
    "save.sync",
    "save.reports",  # the ranks' reports are about to be exchanged
    "save.manifest",
    "save.rename",
    "save.renamed",
    "save.retain",  # older checkpoints are about to be removed
    "load.verify",
    "load.read",
)
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_VALUES = {"nan": float("nan"), "inf": float("inf")}
_ACTIONS = (*_SIGNALS, *_ERRORS, *_VALUES, "sleep", "flip", "truncate")


@dataclass
class _Rule:
    action: str
    at: str
    rank: int | None = None
    nth: int = 1
    times: int = 1
    seconds: float = 0.0
    passed: int = 0

    def is_due(self, point: str, rank: int) -> bool:
        """Whether it happens at this passage, which is counted."""
        if point != self.at or self.rank not in (None, rank):
            return False
        self.passed += 1
        return self.nth <= self.passed < self.nth + self.times


_rules: tuple[_Rule, ...] = ()
_rank = 0
_file: Path | None = None
_version: tuple[int, int] | None = None  # of the file, as read
_say: Callable[[str], None] = print


def configure(rank: int, say: Callable[[str], None]) -> None:
    """Nothing; from now on the rules of LDM_FAULTS happen in this process and its forks.

    Raises: ConfigError if a rule cannot be understood.
    """
    global _rank, _file, _version, _say
    text = os.environ.get(VARIABLE, "")
    _rank, _say = rank, say
    _file, _version = (Path(text) if text.startswith("/") else None), None
    _take("" if _file else text)
    _read_anew()


def _take(text: str) -> None:
    global _rules
    _rules = tuple(_parsed(rule.strip()) for rule in text.split(";") if rule.strip())
    for rule in _rules:
        _say(f"{VARIABLE} is set: {rule.action} at {rule.at} (rank {'any' if rule.rank is None else rule.rank})")


def _read_anew() -> None:
    """Nothing; the rules are those of the file, where the variable names one."""
    global _version
    if _file is None:
        return
    try:
        with _file.open(encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            version = found.st_ino, found.st_mtime_ns
            if version == _version:
                return
            text = file.read()
    except FileNotFoundError:
        version, text = (0, 0), ""
    if version != _version:
        _version = version
        _take(text)


def reach(point: str, path: Path | None = None) -> None:
    """Nothing, or what a rule says of this point; `path` is the file that is there to be damaged.

    Raises: OSError where a rule says so.
    """
    _read_anew()
    for rule in _rules:
        if rule.action in _VALUES or not rule.is_due(point, _rank):
            continue
        if rule.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[rule.action])
        elif rule.action == "sleep":
            time.sleep(rule.seconds)
        elif rule.action in _ERRORS:
            number = _ERRORS[rule.action]
            raise OSError(number, os.strerror(number))
        elif path is not None:
            _damage(path, rule.action)


def poison(point: str, value: Tensor) -> Tensor:
    """The value, its first element spoilt in place where a rule says so. Shapes: any."""
    _read_anew()
    for rule in _rules if value.numel() else ():
        if rule.action in (*_VALUES, "flip") and rule.is_due(point, _rank):
            with torch.no_grad():
                first = value.detach().as_strided((1,), (1,), value.storage_offset())  # whatever the layout
                if rule.action == "flip":
                    first.view(torch.uint8)[0] ^= 1
                else:
                    first.fill_(_VALUES[rule.action])
    return value


def _damage(path: Path, action: str) -> None:
    """One bit in the middle changed, or the second half gone."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if action == "truncate":
            file.truncate(size // 2)
            return
        file.seek(size // 2)
        byte = file.read(1)
        file.seek(size // 2)
        file.write(bytes([byte[0] ^ 1]))


def _parsed(text: str) -> _Rule:
    action, _, rest = text.partition(":")
    values = dict(part.strip().partition("=")[::2] for part in rest.split(",") if part.strip())
    try:
        rule = _Rule(
            action,
            values.pop("at"),
            None if "rank" not in values else int(values.pop("rank")),
            int(values.pop("nth", "1")),
            int(values.pop("times", "1")),
            float(values.pop("seconds", "0")),
        )
        is_known = not values and action in _ACTIONS and rule.at in POINTS
    except (KeyError, ValueError):
        is_known = False
    if not is_known:
        raise ConfigError(
            f"{VARIABLE}: {text!r} is no rule; write ACTION:at=POINT with rank=, nth=, times=, seconds= after commas; "
            f"actions: {', '.join(_ACTIONS)}; points: {', '.join(POINTS)}"
        )
    return rule
