"""No secret of the environment or of a URL stands in what a run writes, says or shows in the list of processes.

Shards lie on a server and are named with user, password and signature, in a manifest (as `prepare index` was told
them) and in a configuration. The server answers some requests with what they were, as some do.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest

from ldm_scale.__main__ import main
from ldm_scale.errors import DataError
from ldm_scale.processes import end_with_parent
from tests.helpers.commands import stage2
from tests.helpers.deaths import exit_with, import_training
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_sample, write_tar

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")
CANARY = "canary7secret"


class _Handler(BaseHTTPRequestHandler):
    """Serves the files of `folder`; what is asked of /refused and /broken is answered with the request itself."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        asked = f"{self.path} {self.headers}".encode()
        file = self.folder / path
        if "refused" in path or "broken" in path:
            self._answer(403 if "refused" in path else 500, asked, {})
        elif not file.is_file():
            self._answer(404, asked, {})
        else:
            content = file.read_bytes()
            span = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            first, last = int(span[0]), min(int(span[2] or len(content)), len(content) - 1)
            self._answer(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "ETag": '"1"'}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@dataclass
class Said:
    """What a command has said, and the command lines of the processes that it has started."""

    status: int
    output: str
    command_lines: set[str] = field(default_factory=set)

    @property
    def places(self) -> list[str]:
        """Where the canary is."""
        lines = [f"output: {line}" for line in self.output.splitlines() if CANARY in line]
        return lines + [f"process: {line}" for line in self.command_lines if CANARY in line]


@dataclass
class Place:
    """A folder with shards, and the server that serves them."""

    folder: Path
    port: int

    def url(self, name: str) -> str:
        """With user, password and signature."""
        return f"http://user:{CANARY}@127.0.0.1:{self.port}/{name}?X-Amz-Signature={CANARY}&x=1"

    def run(self, *arguments: str) -> Said:
        """A command in a fork of this process, in an environment of secrets."""
        log = self.folder / "said"
        log.write_text("")
        import_training()
        parent, pid = os.getpid(), os.fork()
        if not pid:
            exit_with(lambda: self._main(parent, log, arguments))
        lines: set[str] = set()
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            with suppress(psutil.NoSuchProcess):
                for one in psutil.Process(pid).children(recursive=True):
                    lines.add(" ".join(one.cmdline()))
            time.sleep(0.05)
        return Said(os.waitstatus_to_exitcode(ended[1]), log.read_text(), lines)

    def _main(self, parent: int, log: Path, arguments: tuple[str, ...]) -> int:
        end_with_parent(parent)
        fd = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ |= dict.fromkeys(SECRETS, CANARY)
        os.chdir(self.folder)
        return main(arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("secrets")
    samples = [(f"s{n}", make_sample(n, 20, np.random.default_rng(n))) for n in range(16)]
    write_tar(folder / "good.tar", samples)
    tiny_artifact(folder / "artifact")
    handler = type("Handler", (_Handler,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Place(folder, server.server_address[1])
        server.shutdown()


def _files_with_canary(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.mark.timeout(600)
def test_no_secret_shows(place: Place) -> None:
    folder = place.folder
    manifest, run, cache = folder / "data" / "manifest.json", folder / "run", folder / "cache"
    indexed = place.run("prepare", "index", place.url("good.tar"), "--out", str(manifest))
    assert indexed.status == 0, indexed.output
    assert CANARY in manifest.read_text()  # it would not be found by other URLs
    training = stage2(folder, run, "train.total_images=16", "data.num_workers=1")
    said = [indexed, place.run("train", *training)]
    said += [
        place.run("encode", str(folder / "artifact"), str(manifest), "--out", str(cache)),
        place.run("sample", str(run), "--out", str(folder / "samples.png"), "--prompt", "a"),
        place.run("export", str(run), "--to", "safetensors", "--out", str(folder / "export")),
    ]
    measured = ["--data", str(manifest), "--split", "train", "--out", str(folder / "measured")]
    said.append(place.run("evaluate", "autoencoder", str(folder / "artifact"), *measured))
    # `encode` reads local shards alone and says so; the others succeed.
    assert [one.status for one in said] == [0, 0, DataError.exit_code, 0, 0, 0], "".join(one.output for one in said)
    assert [one.places for one in said] == [[]] * len(said)
    assert said[1].command_lines  # its loader process, at least
    outputs = (run, folder / "samples", folder / "export", folder / "measured")
    assert [name for name in outputs if _files_with_canary(name)] == []


@pytest.mark.timeout(600)
def test_no_secret_of_a_configuration_is_stored(place: Place) -> None:
    """Shards without a manifest are named in the configuration, which checkpoints and exports keep."""
    run = place.folder / "run-2"
    # A query after .tar does not end a name of shards, so that the signature cannot be part of such a name.
    url = f"http://user:{CANARY}@127.0.0.1:{place.port}/good.tar"
    arguments = stage2(place.folder, run, "train.total_images=16", "data.num_workers=1", f"data.manifest='{url}'")
    said = place.run("train", *arguments)
    assert said.status == 0, said.output
    assert said.places == []
    assert (run / "result.json").exists()
    assert _files_with_canary(run) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["refused.tar", "missing.tar"])
def test_no_secret_is_in_an_error(place: Place, name: str) -> None:
    said = [
        place.run("prepare", "index", place.url(name), "--out", str(place.folder / "no.json")),
        place.run("prepare", "index", f"gopher:{CANARY}", "--out", str(place.folder / "no.json")),
    ]
    assert [one.status > 0 for one in said] == [True] * 2
    assert name in said[0].output
    assert [one.places for one in said] == [[], []]


@pytest.mark.timeout(600)
def test_no_secret_is_in_a_refusal_or_a_name(place: Place) -> None:
    """URLs where paths belong: of inputs, which are not found, and of outputs, of which no folder is made."""
    url = place.url("good.tar")
    said = [
        place.run("train", *stage2(place.folder, place.folder / "run-3", f"run_dir={url}")),
        place.run("train", *stage2(place.folder, place.folder / "run-3", f"artifact={url}")),
        place.run("export", str(place.folder / "artifact"), "--to", "safetensors", "--out", url),
        place.run("encode", str(place.folder / "artifact"), url, "--out", str(place.folder / "cache-2")),
        place.run("sample", url, "--prompt", "a"),
        place.run("evaluate", "autoencoder", url, "--data", url),
        place.run("replay", url),
        place.run("doctor", "data", url),
        place.run("doctor", "data", url, "--json"),
    ]
    assert [one.status > 0 and "error" in one.output for one in said] == [True] * len(said), said
    assert [one.places for one in said] == [[]] * len(said)
    assert [path for path in place.folder.rglob("*") if CANARY in path.name] == []
