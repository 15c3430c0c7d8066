"""Faults in the process that asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ldm_scale import faults


@contextmanager
def faults_set(rules: str, rank: int = 0) -> Iterator[None]:
    """Inside the block those rules of LDM_FAULTS hold in this process."""
    before = os.environ.get(faults.VARIABLE)
    os.environ[faults.VARIABLE] = rules
    faults.configure(rank, lambda text: None)
    try:
        yield
    finally:
        del os.environ[faults.VARIABLE]
        if before is not None:
            os.environ[faults.VARIABLE] = before
        faults.configure(rank, lambda text: None)
