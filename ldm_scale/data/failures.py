"""What went wrong in one try to read from a server, in words that hold no secret.

Errors of the libraries below quote URLs with their signatures, and request headers. Their text is used only where it
cannot; what is said is ours.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from ldm_scale.data.urls import redact

# What botocore raises when a connection fails; its other errors (no credentials, wrong parameters) stay the same.
_BOTO_PASSING = re.compile(r"Connect|Timeout|Proxy|HTTPClient|Streaming|IncompleteRead|ResponseParser")
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "ThrottlingException"})


class Failure(Exception):
    """One try that did not succeed, in words that hold nothing secret."""

    def __init__(self, reason: str, is_final: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_final = is_final  # another try would end the same way
        self.retry_after_s = retry_after_s  # what the server asks for


def of_status(status: int, retry_after: str | None = None) -> Failure:
    """What an HTTP status means."""
    if status in (404, 410):
        return Failure(f"there is no such object ({status}); check the name", True)
    if status in (401, 403):
        return Failure(f"access is refused ({status}); check the credentials, or renew the signed URL", True)
    if status not in _PASSING_STATUS:
        return Failure(f"the server answers with status {status}", True)
    return Failure(f"the server answers with status {status}", False, _seconds(retry_after))


def _seconds(retry_after: str | None) -> float | None:
    """How long a Retry-After header says to wait, in seconds or as a date."""
    if not retry_after:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of s3fs (its cause holds the answer) or gcsfs."""
    answer = getattr(error.__cause__ or error, "response", None)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    status = status or getattr(error, "code", None)
    return int(status) if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()) else None


def describe(error: Exception, stall_s: float) -> Failure:
    """What an error of any library below means. Its own text is left out where it may hold a URL or a header."""
    kind = type(error)
    status = status_of(error) if isinstance(error, OSError) and not isinstance(error, aiohttp.ClientError) else None
    answer: Any = getattr(error.__cause__ or error, "response", None)
    if isinstance(error, Failure):
        return error
    if status is not None:
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(answer, dict) else {}
        if code in _PASSING_CODES:
            return Failure(f"the server answers {code} ({status})", False, _seconds(headers.get("retry-after")))
        return of_status(status, headers.get("retry-after"))
    if isinstance(error, FileNotFoundError):
        return Failure("there is no such object; check the name", True)
    if isinstance(error, PermissionError):
        return Failure("access is refused; check the credentials", True)
    if isinstance(error, aiohttp.ClientSSLError):
        return Failure(f"no trusted TLS connection ({kind.__name__}); check the server's certificate", True)
    if isinstance(error, (aiohttp.InvalidURL, aiohttp.TooManyRedirects)):
        return Failure(f"the address leads nowhere ({kind.__name__})", True)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Failure("the host's name is not known")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failure(f"no connection ({os.strerror(error.errno) if error.errno else kind.__name__})")
    if isinstance(error, TimeoutError):
        return Failure("no connection in time" if "Connect" in kind.__name__ else f"nothing came for {stall_s:g} s")
    if kind.__module__.startswith(("botocore", "aiobotocore")):
        text = "" if _BOTO_PASSING.search(kind.__name__) else f": {redact(str(error))[:200]}"
        return Failure(f"{kind.__name__}{text}", bool(text))
    if isinstance(error, (aiohttp.ClientError, OSError, EOFError)):
        return Failure(f"the connection broke ({kind.__name__})")
    return Failure(f"{kind.__name__}: {redact(str(error))[:200]}", True)
