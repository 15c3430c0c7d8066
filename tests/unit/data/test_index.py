"""`prepare index`: what it writes of sound and damaged shards, killed, changed and remote ones."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ldm_scale.data import open_manifest, scan
from ldm_scale.data.manifest import read_manifest
from ldm_scale.data.sidecar import open_sidecar
from ldm_scale.data.sources.tars import IndexOptions, index_tars
from ldm_scale.errors import DataError
from ldm_scale.prepare import main
from tests.helpers.shards import make_dataset, png, write_tar

PIXEL = png(Image.new("RGB", (4, 2)))


def _bad_samples(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_row_of_a_damaged_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [(f"{n:02d}", {"png": PIXEL, "txt": b"x"}) for n in range(20)]
    samples[3][1]["pkl"] = b"code"
    write_tar(tmp_path / "a.tar", samples)
    cut = write_tar(tmp_path / "b.tar", samples[4:])
    cut.write_bytes(cut.read_bytes()[: -(10240 + 700)])
    arguments = ["index", str(tmp_path / "*.tar"), "--out", str(tmp_path / "manifest.json")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "left out: 1 (pickle, which runs code when read)" in out
    first, second = read_manifest(tmp_path / "manifest.json")["splits"]["train"]["shards"]
    assert (first["num_samples"], first["bad"]) == (19, 1)
    assert second["num_samples"] < 16
    sidecar = open_sidecar(tmp_path / first["index"])
    assert [sidecar.name(row) for row in range(19)] == [name for name, _ in samples if name != "03"]
    assert sidecar.bad == (("03", scan.PICKLE),)
    assert sidecar.sample(0).picture == (4, 2)
    found = _bad_samples(tmp_path)
    assert found[0] == {"shard": "a.tar", "key": "03", "reason": scan.PICKLE}
    assert len(found) == first["bad"] + second["bad"]
    dataset = open_manifest(tmp_path, "train")
    assert "a/03" not in list(dataset.keys())
    for number in range(dataset.num_samples):
        assert dataset.read(number)["png"] == PIXEL
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "reused"


def test_a_shard_beyond_the_budget_is_left_out_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [(f"{n:02d}", {"png": PIXEL}) for n in range(40)]
    write_tar(tmp_path / "a.tar", good)
    write_tar(tmp_path / "b.tar", [("x", {"png": PIXEL}), ("y", {"txt": b""}), ("z", {"txt": b""})])
    (tmp_path / "c.tar").write_bytes(b"<html>not found</html>")
    assert main(["index", f"{tmp_path}/{{a,b,c}}.tar", "--out", str(tmp_path / "m.json")]) == 0
    out = capsys.readouterr().out
    assert "train: left out whole: b.tar (2 unusable parts)" in out
    assert f"left out: 1 ({scan.NOT_A_TAR})" in out
    split = read_manifest(tmp_path / "m.json")["splits"]["train"]
    assert [row["file"] for row in split["shards"]] == ["a.tar"]
    assert [row["file"] for row in split["quarantined"]] == ["b.tar", "c.tar"]
    assert [record["shard"] for record in _bad_samples(tmp_path)] == ["b.tar", "b.tar", "c.tar"]
    (tmp_path / "d.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:-512])
    index_tars([tmp_path / "d.tar"], tmp_path / "d.json", "train")  # a manifest beside the other
    assert [record["shard"] for record in _bad_samples(tmp_path)] == ["b.tar", "b.tar", "c.tar"]
    options = IndexOptions(max_bad_total=0.05)
    with pytest.raises(
        DataError, match=r"4 of 44 samples cannot be used: b.tar \(2 x no image .*c.tar \(1 x not a tar"
    ):
        index_tars([tmp_path / "[a-c].tar"], tmp_path / "m.json", "train", options=options)
    with pytest.raises(DataError, match=r"all shards cannot be used: c.tar"):
        index_tars([tmp_path / "c.tar"], tmp_path / "n.json", "train")


def test_workers_and_a_second_run_change_no_byte(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        make_dataset(folder, num_samples=12, samples_per_shard=2)
        for path in folder.glob("*.tar"):
            os.utime(path, (1, 1))  # part of what a sidecar is of
        for path in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
            path.unlink()
    index_tars([tmp_path / "one" / "*.tar"], tmp_path / "one" / "m.json", "train", options=IndexOptions(workers=1))
    index_tars([tmp_path / "two" / "*.tar"], tmp_path / "two" / "m.json", "train", options=IndexOptions(workers=3))
    one, two = _files(tmp_path / "one"), _files(tmp_path / "two")
    one["m.json"] = one["m.json"].replace(b'"one"', b'"two"')  # the folder's name is the data set's
    assert one == two


def test_a_shard_that_changed_is_indexed_anew_and_others_are_not_read(tmp_path: Path) -> None:
    make_dataset(tmp_path, num_samples=4, samples_per_shard=2)
    manifest = tmp_path / "manifest.json"
    before = read_manifest(manifest)["splits"]["train"]["shards"]
    kept = (tmp_path / before[0]["index"]).stat().st_mtime_ns
    write_tar(tmp_path / "train-000001.tar", [(f"{n}", {"png": PIXEL}) for n in range(5)])
    prepared = index_tars([tmp_path / "*.tar"], manifest, "train")
    assert not prepared.reused
    after = read_manifest(manifest)["splits"]["train"]["shards"]
    assert (after[0], after[1]["num_samples"]) == (before[0], 5)
    assert (tmp_path / before[0]["index"]).stat().st_mtime_ns == kept
    assert open_manifest(manifest, "train").num_samples == 7


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    payload = [(f"{n}", {"png": PIXEL, "bin": bytes(4 << 20)}) for n in range(6)]
    write_tar(tmp_path / "00.tar", payload)
    for number in range(1, 40):
        os.link(tmp_path / "00.tar", tmp_path / f"{number:02d}.tar")
    code = "import sys; from ldm_scale.prepare import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["index", f"{tmp_path}/*.tar", "--out", str(tmp_path / "m.json"), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline and any(str(tmp_path).encode() in line for line in _command_lines()):
        time.sleep(0.05)  # workers end with their parent
    assert not any(str(tmp_path).encode() in line for line in _command_lines())
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[0-9]*.safetensors")}
    assert 3 <= len(done) < 40, "killed too late to tell anything"
    assert not (tmp_path / "m.json").exists()
    for path in done:
        assert len(open_sidecar(path)) == 6
    assert main(arguments) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert open_manifest(tmp_path / "m.json", "train").num_samples == 240


def _command_lines() -> Iterator[bytes]:
    """Of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges and ETags, counting the bytes that are sent."""

    sent = requests = 0
    tag = '"1"'
    directory: str

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments, directory=type(self).directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        start, stop, status = 0, len(content), 200
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last) + 1 if last else len(content), len(content)), 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", self.tag)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        type(self).requests += 1
        type(self).sent += stop - start
        self.wfile.write(content[start:stop])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    _Handler.directory, _Handler.sent, _Handler.requests, _Handler.tag = str(tmp_path / "served"), 0, 0, '"1"'
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def _noise(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (700, 600), random.Random(seed).randbytes(3 * 700 * 600)).save(buffer, format="JPEG")
    return buffer.getvalue()


def test_a_remote_shard_is_indexed_from_a_part_of_its_bytes(tmp_path: Path, server: str) -> None:
    served = tmp_path / "served"
    picture = _noise(0)
    for shard in range(2):
        samples = [
            (f"{n:03d}", {"jpg": picture, "txt": b"a noise", "json": b'{"class": "n"}'}) for n in range(10 * shard, 20)
        ]
        write_tar(served / f"{shard}.tar", samples)
    total = sum(path.stat().st_size for path in served.glob("*.tar"))
    index_tars([f"{served}/*.tar"], tmp_path / "local.json", "train")
    index_tars([f"{server}/{{0..1}}.tar"], tmp_path / "remote.json", "train")
    headers_only, requests = _Handler.sent, _Handler.requests
    assert headers_only < total / 3
    assert requests < 3 * 30
    local, remote = (read_manifest(tmp_path / f"{name}.json") for name in ("local", "remote"))
    assert local["classes"] == remote["classes"] == ["n"]
    for one, two in zip(local["splits"]["train"]["shards"], remote["splits"]["train"]["shards"], strict=True):
        assert two["file"] == f"{server}/{Path(one['file']).name}"
        assert {key: one[key] for key in ("num_samples", "bytes", "keys")} == {
            key: two[key] for key in ("num_samples", "bytes", "keys")
        }
        assert "sha256" not in two
        ours, theirs = open_sidecar(tmp_path / one["index"]), open_sidecar(tmp_path / two["index"])
        for column in ("names", "name_ends", "offsets", "sizes", "pictures"):
            assert (getattr(ours, column) == getattr(theirs, column)).all()
        assert ours.crc32 is not None
        assert theirs.crc32 is None

    _Handler.sent = 0
    assert index_tars([f"{server}/{{0..1}}.tar"], tmp_path / "remote.json", "train").reused
    assert _Handler.sent < 100
    options = IndexOptions(checksums=True)
    index_tars([f"{server}/{{0..1}}.tar"], tmp_path / "remote.json", "train", options=options)
    rows = read_manifest(tmp_path / "remote.json")["splits"]["train"]["shards"]
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in local["splits"]["train"]["shards"]]
    assert total <= _Handler.sent < 1.1 * total
    assert (
        open_sidecar(tmp_path / rows[0]["index"]).crc32
        == open_sidecar(tmp_path / "local.index" / "0.index.safetensors").crc32
    ).all()  # type: ignore[union-attr]

    _Handler.sent, _Handler.tag = 0, '"2"'
    index_tars([f"{server}/{{0..1}}.tar"], tmp_path / "remote.json", "train", options=options)
    assert _Handler.sent >= total
