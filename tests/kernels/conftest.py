"""Tests of fused kernels run on a GPU where there is one, and in Triton's interpreter where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernels import NO_KERNELS

_left_out: list[pytest.Item] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out, in one line instead of hundreds, the tests that would all be skipped for the same reason."""
    if NO_KERNELS:
        here = Path(__file__).parent
        _left_out.extend(i for i in items if here in i.path.parents and "device" in getattr(i, "fixturenames", ()))
        config.hook.pytest_deselected(items=_left_out)
        items[:] = [item for item in items if item not in set(_left_out)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was left out, and how it is run."""
    if _left_out:
        terminalreporter.write_line(
            f"{len(_left_out)} tests of fused kernels left out ({NO_KERNELS}): `make test` runs them too, by "
            "TRITON_INTERPRET=1 pytest tests/kernels"
        )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where kernels run here; outputs that a kernel forgets to write come out as NaN."""
    if NO_KERNELS:
        pytest.skip(NO_KERNELS)
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, _poisoned(getattr(Tensor, name)))
    return "cuda" if torch.cuda.is_available() else "cpu"


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.device.type == "meta" or type(tensor) is not Tensor or not torch.is_floating_point(tensor):
            return tensor
        with torch.no_grad():
            return tensor.fill_(float("nan"))

    return allocate_poisoned
