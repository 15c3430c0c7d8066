"""What of a name or a text may be shown or stored: URLs without users, passwords, queries and signatures.

Every line of the log, every error and every configuration that is stored goes through `public_urls`.
"""

from __future__ import annotations

import re

_DELIMITER = re.compile(r"[/?#;]")
# Of a URL without user and password, up to its parameters, query or fragment: host and port, and what follows them.
_HOST = r"(?:\[[^\]/@]*\]|[^/?#;@:\[]+)(?::\d+(?=/|$))?"
_PLACE = re.compile(_HOST + r"(?:/[^@?#;]*)?(?=[?#;]|$)")
_AFTER_USER = re.compile(rf"@({_HOST}/[^@?#;]*)(?=[?#;]|$)")
# With one slash too: a path makes one of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/[^\s'\"<>\\^`|]*")
# Credentials that stand in a text without their URL; the value goes, the name stays.
_SECRET = re.compile(
    r"(?i)\b((?:x-(?:amz|goog)-[a-z-]+|awsaccesskeyid|googleaccessid|signature|sig|policy|key-pair-id"
    r"|aws_(?:secret_access_key|session_token)|(?:access_|refresh_|id_)?token|password|secret)\s*[=:]\s*)[^\s&,;'\"<>)}]+"
)
_AUTHORIZATION = re.compile(r"(?i)\b(authorization['\"]?\s*[=:]\s*['\"]?|(?:basic|bearer)\s+)[^\r\n'\"<>]+")


def public_name(name: str) -> str:
    """The name without user, password, parameters, query and fragment: what may stand in a log or a file name.

    Passwords that should have been quoted (`p#ss`, `p/ss`) are taken out too. Where it cannot be told whether an at
    sign ends one or belongs to the query, neither host nor path is shown.
    """
    if "://" not in name:
        return name
    scheme, _, rest = name.partition("://")
    if scheme.lower() == "file":
        return name
    if ":" not in rest.rpartition("@")[0]:
        rest = rest[_DELIMITER.split(rest, maxsplit=1)[0].rfind("@") + 1 :]
    elif _PLACE.match(rest) is None:
        # A signature may hold an at sign too, so that the last one need not be that before the host.
        after_user = _AFTER_USER.search(rest)
        if after_user is not None:
            rest = after_user[1]
        elif re.search(r"[?#;]", rest):
            rest = "..."
        else:
            rest = rest.rpartition("@")[2]
    return f"{scheme}://{re.split('[?#;]', rest, maxsplit=1)[0]}"


def public_urls(text: str) -> str:
    """The text with every URL in it made public."""
    return _URL.sub(_public, text) if ":/" in text else text


def _public(match: re.Match[str]) -> str:
    url = match[0].rstrip(";,.)")  # the sentence's
    scheme, slash, rest = re.split("(://?)", url, maxsplit=1)
    return public_name(f"{scheme}://{rest}").replace("://", slash, 1) + match[0][len(url) :]


def redact(text: str) -> str:
    """The text with every URL in it made public, and without values of signatures, tokens and passwords."""
    return _SECRET.sub(r"\1...", _AUTHORIZATION.sub(r"\1...", public_urls(text)))
