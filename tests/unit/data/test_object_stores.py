"""S3 and Google Cloud; what they share with web servers is in test_storage.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_scale.data import remote
from ldm_scale.data.storage import Storage, StorageError, StorageSettings, expand
from ldm_scale.errors import DataError
from tests.helpers.s3 import S3_CREDENTIALS, use_s3

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = CONTENT[::-1]
QUICK = StorageSettings(
    connect_s=1.0, stall_s=0.2, min_bytes_per_s=50_000, budget_s=1.2, max_retries=3, backoff_s=0.01, max_backoff_s=0.05
)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], None]]:
    """Puts an object into s3://bucket of a real S3 API."""
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    botocore = pytest.importorskip("botocore.session", reason="the extra s3 is not installed")
    moto = pytest.importorskip("moto.server", reason="moto's server is not installed")
    api = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    api.start()
    host, port = api.get_host_and_port()
    use_s3(monkeypatch, f"http://{host}:{port}")
    client = botocore.get_session().create_client("s3")
    client.create_bucket(Bucket="bucket")
    yield lambda key, content: client.put_object(Bucket="bucket", Key=key, Body=content)
    api.stop()


@pytest.mark.usefixtures("anew")
def test_a_real_s3_api(bucket: Callable[[str, bytes], None]) -> None:
    for key in ("d/b.tar", "d/a.tar", "d/deep/c.tar", "d/x.json"):
        bucket(key, CONTENT)
    bucket("empty", b"")
    names = expand(["s3://bucket/d/*.tar"])
    assert names == ["s3://bucket/d/a.tar", "s3://bucket/d/b.tar"]
    assert expand(["s3://bucket/d/**/*.tar"]) == [*names, "s3://bucket/d/deep/c.tar"]
    with pytest.raises(DataError, match="matches nothing"):
        expand(["s3://bucket/e/*.tar"])
    storage = Storage(QUICK)
    assert storage.read(names[0], 5_000, 290_000) == CONTENT[5_000:290_000]
    assert b"".join(storage.stream(names[0], 7)) == CONTENT[7:]
    assert (storage.size(names[1]), storage.size("s3://bucket/empty")) == (len(CONTENT), 0)
    with pytest.raises(StorageError, match="no such object"):
        storage.read("s3://bucket/none", 0, 1)
    with pytest.raises(StorageError, match="no such object"):
        storage.read("s3://no-bucket/none", 0, 1)
    bucket("d/a.tar", OTHER)
    with pytest.raises(StorageError, match="has changed"):
        storage.read(names[0], 0, 10)
    bucket("d/new.tar", b"")
    assert len(expand(["s3://bucket/d/*.tar"])) == 3


@pytest.mark.usefixtures("anew")
def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, "http://127.0.0.1:9")
    for name in S3_CREDENTIALS:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StorageError, match="NoCredentialsError: Unable to locate credentials"):
        Storage(QUICK).read("s3://bucket/x.tar", 0, 10)


@pytest.mark.usefixtures("anew")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> Any:
        raise ImportError(f"Install {scheme} to access it")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(StorageError, match="pip install gcsfs"):
        Storage(QUICK).read("gs://bucket/x", 0, 10)
    with pytest.raises(StorageError, match="pip install s3fs"):
        expand(["s3://bucket/*"])


class _Object:
    """What is used of gcsfs: sizes, generations and ranges, in coroutines; the object may change while it is read."""

    def __init__(self, content: bytes, num_changes: int = 0) -> None:
        self.content, self.generation, self.num_changes = content, 1, num_changes

    def invalidate_cache(self) -> None:
        pass

    async def _info(self, path: str) -> dict[str, Any]:
        return {"size": len(self.content), "generation": str(self.generation)}

    async def _cat_file(self, path: str, start: int, end: int) -> bytes:
        assert end - start <= 70_000
        data = self.content[start:end]
        if self.num_changes:
            self.content, self.generation, self.num_changes = OTHER, self.generation + 1, self.num_changes - 1
        return data


def test_google_cloud_reads_ranges_of_one_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "filesystem", lambda scheme: made)
    monkeypatch.setattr(remote, "_PIECE", 70_000)
    made, storage = _Object(CONTENT), Storage(QUICK)
    assert storage.read("gs://b/x", 5, 200_000) == CONTENT[5:200_000]
    assert storage.read_all("gs://b/x") == CONTENT
    with pytest.raises(StorageError, match="300000 bytes"):
        storage.read("gs://b/x", 0, 300_001)
    made.num_changes = 1
    with pytest.raises(StorageError, match="changed"):
        storage.read("gs://b/x", 5, 10)
    # Not known before: the new one is read, all of it.
    made = _Object(CONTENT, num_changes=1)
    assert Storage(QUICK).read("gs://b/x", 5, 200_000) == OTHER[5:200_000]  # from the second try on
    made = _Object(CONTENT, num_changes=99)
    with pytest.raises(StorageError, match="changed"):
        Storage(QUICK).read("gs://b/x", 5, 10)
