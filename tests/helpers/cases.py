"""Cases that are many: `make test` runs a sample of them, `make test-rest` the others."""

from __future__ import annotations

from typing import Any

import pytest


def rarely(*values: Any, id: str | None = None) -> Any:
    """A case of `make test-rest` alone, for `pytest.mark.parametrize`."""
    return pytest.param(*values, marks=pytest.mark.rest, id=id)
