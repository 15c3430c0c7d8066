"""An S3 endpoint of a test in the environment."""

from __future__ import annotations

import pytest

S3_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYKEYID",
    "AWS_SECRET_ACCESS_KEY": "canarysecret/aws",
    "AWS_SESSION_TOKEN": "canarysession",
}


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Nothing; for this test, S3 is at that URL."""
    others = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {"AWS_ENDPOINT_URL_S3": endpoint, **S3_CREDENTIALS, **others}.items():
        monkeypatch.setenv(name, value)
