from __future__ import annotations

from collections.abc import Iterator

import pytest

from ldm_scale.data.remote import close_filesystems


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def anew() -> Iterator[None]:
    """Nothing; connections by the configuration of before and after are not this test's."""
    close_filesystems()
    yield
    close_filesystems()
