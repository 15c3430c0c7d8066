"""Names of shards: patterns, what is refused, and what of a name may be shown."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ldm_scale.data.storage import expand
from ldm_scale.data.urls import expand_names, public_name, redact
from ldm_scale.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s3://b/x-{08..10}.tar", ["s3://b/x-08.tar", "s3://b/x-09.tar", "s3://b/x-10.tar"]),
        ("gs://{a,b}/{0..1}.tar", ["gs://a/0.tar", "gs://a/1.tar", "gs://b/0.tar", "gs://b/1.tar"]),
        ("https://u:p@h/{0..1}.tar?sig=a*b", ["https://u:p@h/0.tar?sig=a*b", "https://u:p@h/1.tar?sig=a*b"]),
        ("http://[::1]:80/x.tar", ["http://[::1]:80/x.tar"]),
        ("file:///d/{0..1}.tar", ["/d/0.tar", "/d/1.tar"]),
        ("./d//{0..1}.tar", ["d/0.tar", "d/1.tar"]),
        (r"s3://b/\{0\}.tar", ["s3://b/{0}.tar"]),
        ("{s3://a/x,/y/z}.tar", ["s3://a/x.tar", "/y/z.tar"]),
    ],
)
def test_braces_expand_as_in_bash(pattern: str, expected: list[str]) -> None:
    assert expand([pattern]) == expected


def test_patterns_keep_their_order_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("c.tar", "a.tar", "b.tar", "deep/d.tar", "$HOME.tar", "x[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = expand([f"{tmp_path}/c.tar", f"file://{tmp_path}/[ab].tar", f"{tmp_path}/deep/**/*.tar"])
    assert names == [str(tmp_path / name) for name in ("c.tar", "a.tar", "b.tar", "deep/d.tar")]
    # What exists is itself; nothing of the environment enters a name.
    assert expand([f"{tmp_path}/x[1].tar", f"{tmp_path}/$HOME.tar"])[1] == str(tmp_path / "$HOME.tar")


@pytest.mark.parametrize(
    ("patterns", "rule"),
    [
        (["pipe:cat /etc/passwd"], "commands are never run"),
        (["{pipe:touch x,a}.tar"], "commands are never run"),
        (["{p,}ipe:touch x"], "commands are never run"),
        (["PIPE://touch x"], "commands are never run"),
        (["zip://*.tar::http://h/x.zip"], "commands are never run"),
        (["simplecache::s3://b/x.tar"], "commands are never run"),
        (["ftp://h/x.tar"], "commands are never run"),
        (["s3:b/x.tar"], "commands are never run"),
        (["file://host/x.tar"], "three slashes"),
        (["/nowhere/x.tar"], "matches nothing"),
        (["/nowhere/*.tar"], "matches nothing"),
        (["$HOME/*"], "matches nothing"),
        (["~/*"], "matches nothing"),
        (["http://h/*.tar"], "lists no files"),
        (["/d/{0..2}.tar", "/d/{2..4}.tar"], "named 2 times"),
        (["/d/{0..2}.tar", "/d/./{2..4}.tar"], "named 2 times"),
        (["/d/{0..2.tar"], "no partner"),
        (["/d/{0..99999999999}.tar"], "more than"),
        (["a\0b"], "printable"),
        ([""], "printable"),
        ([], "no shards are named"),
    ],
)
def test_what_is_no_shard_is_refused(patterns: list[str], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_scale.data.urls.MAX_NAMES", 1000)
    with pytest.raises(DataError, match=rule):
        expand(patterns)


@pytest.mark.parametrize("name", [b"a\n.tar", b"a\x1b[31m.tar", b"a\xff.tar"])
def test_found_names_that_cannot_be_printed_are_refused(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "b.tar").touch()
    Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).touch()
    with pytest.raises(DataError, match=r"a\\.*\.tar': not a shard's name.*printable.*rename") as caught:
        expand([f"{tmp_path}/*.tar"])
    assert str(caught.value).isprintable()
    with pytest.raises(DataError, match="printable"):
        expand_names(["s3://b/*.tar"], lambda _: ["s3://b/x.tar", f"s3://b/{os.fsdecode(name)}"])


def test_a_million_names_take_a_second_or_two() -> None:
    began = time.process_time()
    names = expand(["s3://bucket/laion/{0000000..0999999}.tar"])
    assert time.process_time() - began < 3
    assert (len(names), names[-1]) == (1_000_000, "s3://bucket/laion/0999999.tar")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://me:pw@h:1/a/b.tar?X-Amz-Signature=abc&x=1#f failed", "GET https://h:1/a/b.tar failed"),
        ("url='s3://key:se/cret@b/x' twice http://h/?t=1", "url='s3://b/x' twice http://h/"),
        ("no host: /a?sig=abc&token=zz, X-Goog-Signature=1f", "no host: /a?sig=...&token=..., X-Goog-Signature=..."),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': '...'}"),
        ("aws_secret_access_key = abc/d", "aws_secret_access_key = ..."),
        ("nothing to hide in /data/x-{0..9}.tar: 12", "nothing to hide in /data/x-{0..9}.tar: 12"),
    ],
)
def test_secrets_are_taken_out_of_texts(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_public_names() -> None:
    assert public_name("https://u:p@h/x?a/b@c#d@e") == "https://h/x"
    assert public_name("https://u:p%40@h") == "https://h"
    assert public_name("/data/a?b#c@d") == "/data/a?b#c@d"
    assert public_name("http://[::1]:80/a.tar?e=m@x") == "http://[::1]:80/a.tar"
    assert public_name("s3://bucket/me@x/a.tar") == "s3://bucket/me@x/a.tar"
    assert public_name("http://token@h:80/a.tar") == "http://h:80/a.tar"
    assert public_name("http://h:80/a.tar?e=m@x") == "http://h:80/a.tar"
    assert public_name("http://u:canary#p@h?canary") == "http://..."  # a query or a password


@pytest.mark.parametrize(
    "after", ["", "?X-Amz-Signature=canary", "?a=b@canary", "#canary", ";sig=canary", ";s=a@canary"]
)
@pytest.mark.parametrize("place", ["host/x.tar", "host:80/d/x.tar", "[::1]:80/x.tar", "bucket/{0..9}-*.tar"])
@pytest.mark.parametrize(
    "password", ["canary", "1canary", "#canary", "p?canary", "p/canary", "p;/canary", "p@canary", "p:canary"]
)
def test_no_password_shows_however_it_is_written(password: str, place: str, after: str) -> None:
    for scheme in ("http", "s3"):
        assert public_name(f"{scheme}://user:{password}@{place}{after}") == f"{scheme}://{place}"
        assert public_name(f"{scheme}://{place}{after}") == f"{scheme}://{place}"
        url = f"{scheme}://user:{password}@{place}{after}"
        assert "canary" not in redact(f"GET {url} failed, {Path(url)} too")
