"""A web server on loopback that serves bytes with ranges, breaks as it is told to, and counts what it was asked.

    with FaultServer({"/a.tar": content}) as server:
        server.plan("/a.tar", fault("reset", after=1000), OK)   # the first two requests; all later ones are good
        ... server.url("/a.tar") ... server.count("/a.tar")

It is written on sockets and with none of the libraries that it tests. `after` counts bytes of the body.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

MODIFIED = "Wed, 21 Oct 2015 07:28:00 GMT"
HTML = b"<html><body>please sign in</body></html>" * 50


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request. "ok": nothing."""

    kind: str
    after: int = 0  # bytes of the body that still go out
    status: int = 500
    retry_after: str | None = None
    seconds: float = 30.0  # of a stall; between two bytes of a drip
    content: bytes = b""  # of another object
    etag: str | None = None


OK = Fault("ok")
FAULTS = (
    "reset",  # the connection is reset in mid-body
    "close",  # it is closed in mid-body: fewer bytes than Content-Length says
    "short",  # the body is cut, and Content-Length agrees with what is left of it
    "stall",  # nothing more comes, the connection stays
    "drip",  # a byte at a time
    "corrupt",  # a byte is another one
    "status",
    "ignore_range",  # 200 and all of it
    "chunked",  # 200 and all of it (or `content`), without a length
    "no_length",  # 200 and all of it, ended by closing, as HTTP/1.0 does
    "wrong_range",  # another Content-Range than was asked for
    "less",  # a good answer with fewer bytes than were asked for
    "changed",  # another object of this name
    "html",
    "gzip",  # says that it is compressed
    "redirect",
    "refuse",  # the connection is closed without an answer
)


def fault(kind: str, **details: object) -> Fault:
    """A fault of a kind that exists."""
    assert kind in FAULTS, kind
    return Fault(kind, **details)  # type: ignore[arg-type]


@dataclass
class Counts:
    """What was asked of one path."""

    requests: int = 0
    num_bytes: int = 0  # of bodies, as sent
    ranges: list[str | None] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class FaultServer:
    """Serves `files` (path -> content) until the `with` ends."""

    def __init__(self, files: dict[str, bytes], validators: bool = True) -> None:
        self.files = dict(files)
        self.validators = validators  # whether answers have ETag and Last-Modified
        self.counts: dict[str, Counts] = defaultdict(Counts)
        self._plans: dict[str, list[Fault]] = {}
        self._always: dict[str, Fault] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._http = _Server(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def host(self) -> str:
        """Address and port."""
        return f"127.0.0.1:{self._http.server_address[1]}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def reset(self, files: dict[str, bytes]) -> None:
        """Nothing; as new, with these files."""
        self.files = dict(files)
        self.counts.clear()
        self._plans.clear()
        self._always.clear()

    def plan(self, path: str, *faults: Fault) -> None:
        """Nothing; the next requests of a path go like this, in order."""
        self._plans[path] = list(faults)

    def always(self, path: str, what: Fault) -> None:
        """Nothing; every request of a path goes like this once its plan is used up."""
        self._always[path] = what

    def count(self, path: str) -> Counts:
        return self.counts[path]

    def take(self, path: str) -> Fault:
        """The fault of the request that comes now."""
        with self._lock:
            plan = self._plans.get(path)
            return plan.pop(0) if plan else self._always.get(path, OK)

    def etag(self, content: bytes) -> str:
        return f'"{hash(content) & 0xFFFFFFFFFFFF:x}-{len(content)}"'

    def sleep(self, seconds: float) -> bool:
        """Whether the server goes on after that time."""
        return not self._stop.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing; that clients hang up is what the tests are about."""


def _handler_of(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        owner = server

    return Handler


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer takes the 40 ms of a delayed acknowledgement
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        content = self.owner.files.get(self.path.partition("?")[0])
        if content is None:
            self._head(404, 0)
        else:
            self._head(200, len(content), **{"ETag": self.owner.etag(content), "Last-Modified": MODIFIED})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        what, counts = self.owner.take(path), self.owner.counts[path]
        counts.requests += 1
        counts.times.append(time.monotonic())
        counts.ranges.append(self.headers.get("Range"))
        counts.headers.append(dict(self.headers))
        self.close_connection = what.kind in ("close", "no_length", "refuse")
        try:
            self._answer(path, what, counts)
        except OSError:
            self.close_connection = True

    def _answer(self, path: str, what: Fault, counts: Counts) -> None:
        is_other = what.kind == "changed" or (what.kind == "chunked" and what.content)
        content = what.content if is_other else self.owner.files.get(path)
        if what.kind == "refuse":
            return
        if what.kind == "redirect":
            self._head(302, 0, Location=what.content.decode())
            return
        if what.kind == "status" or content is None:
            retry = {} if what.retry_after is None else {"Retry-After": what.retry_after}
            self._send(404 if content is None else what.status, b"no", counts, **retry)
            return
        if what.kind == "html":
            self._send(200, HTML, counts, **{"Content-Type": "text/html; charset=utf-8"})
            return
        tags = {"ETag": what.etag or self.owner.etag(content), "Last-Modified": MODIFIED}
        tags = tags if self.owner.validators else {}
        if what.kind == "gzip":
            tags["Content-Encoding"] = "gzip"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or what.kind in ("ignore_range", "chunked", "no_length"):
            self._body(200, content, what, counts, tags)
            return
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        end = min(end, len(content) - 1)
        if start >= len(content):
            self._send(416, b"", counts, **{"Content-Range": f"bytes */{len(content)}"})
            return
        if what.kind == "less":
            end = min(end, start + what.after - 1)
        shown = start + 7 if what.kind == "wrong_range" else start
        tags["Content-Range"] = f"bytes {shown}-{end}/{len(content)}"
        self._body(206, content[start : end + 1], what, counts, tags)

    def _head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, body: bytes, counts: Counts, **headers: str) -> None:
        self._head(status, len(body), **headers)
        self._write(body, counts)

    def _write(self, body: bytes, counts: Counts) -> None:
        counts.num_bytes += len(body)  # before its reader can look
        self.wfile.write(body)

    def _body(self, status: int, body: bytes, what: Fault, counts: Counts, tags: dict[str, str]) -> None:
        if what.kind == "corrupt":
            body = body[: what.after] + bytes([body[what.after] ^ 0xFF]) + body[what.after + 1 :]
        if what.kind == "short":
            body = body[: what.after]
        if what.kind == "chunked":
            self._head(status, None, **tags, **{"Transfer-Encoding": "chunked"})
            for begin in range(0, len(body), 1000):
                part = body[begin : begin + 1000]
                self._write(b"%x\r\n%s\r\n" % (len(part), part), counts)
            self._write(b"0\r\n\r\n", counts)
            return
        self._head(status, None if what.kind == "no_length" else len(body), **tags)
        if what.kind == "drip":
            for position in range(len(body)):
                self._write(body[position : position + 1], counts)
                if not self.owner.sleep(what.seconds):
                    return
        elif what.kind in ("reset", "close", "stall"):
            self._write(body[: what.after], counts)
            self.wfile.flush()
            if what.kind == "stall":
                self.owner.sleep(what.seconds)
                self.close_connection = True
            if what.kind == "reset":
                # Unsent bytes first: a reset throws away what the other side has not read yet.
                time.sleep(0.05)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
        else:
            self._write(body, counts)
