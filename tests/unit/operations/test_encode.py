"""`ldm-scale encode`: what it writes, what it keeps, and what a kill leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.__main__ import main
from ldm_scale.config.schema import Config, DataConfig
from ldm_scale.data import latent_shards
from ldm_scale.data.shards import open_manifest
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.encode import main as encode_main
from ldm_scale.engine import env
from ldm_scale.engine.env import Launch
from ldm_scale.interchange.artifact import read_artifact
from ldm_scale.interchange.load import load_autoencoder
from ldm_scale.models.autoencoder import OUTPUT_LOGVAR
from ldm_scale.operations import encode as encode_operation
from tests.helpers.latents import array, encode, other_artifact, read_tar
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import broken_png, make_dataset, make_sample, png, write_tar
from tests.unit.interchange.test_load import write_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", num_samples=20, samples_per_shard=8, resolution=20, splits=("train", "heldout"))
    tiny_artifact(tmp_path / "artifact")
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_cache_has_the_source_s_samples_in_its_order_and_their_moments(folder: Path) -> None:
    report = encode(folder, "--dtype", "float32", "--batch", "3")
    assert report["complete"]
    assert (report["images"], report["encoded_shards"], report["unusable"]) == (40, 6, 0)
    network = load_autoencoder(folder / "artifact").network
    for split in ("train", "heldout"):
        source = open_manifest(folder / "data" / "manifest.json", split)
        cached = open_manifest(folder / "cache", split)
        assert cached.digest == source.digest
        assert [cached.key(n) for n in range(20)] == [source.key(n) for n in range(20)]
        for number in range(20):
            ours, theirs = cached.read(number), source.read(number)
            assert {name: ours[name] for name in ("txt", "json")} == {name: theirs[name] for name in ("txt", "json")}
            assert set(ours) == {"__key__", "txt", "json", "latents.json", "latents.center.npy"}
            with Image.open(io.BytesIO(theirs["png"])) as image:
                small = image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
            x = torch.from_numpy(np.asarray(small).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            with torch.no_grad():
                moments = torch.cat(list(network.encode_moments(x)), dim=1)[0].numpy()
            np.testing.assert_allclose(array(ours["latents.center.npy"]), moments, atol=1e-5)
            variants = {"center": {"box": [0, 0, 20, 20], "flip": False}}
            assert json.loads(ours["latents.json"]) == {"size": [20, 20], "variants": variants}


def test_variants_are_recorded_and_are_what_their_record_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    (tmp_path / "data").mkdir()
    index_tars(
        [write_tar(tmp_path / "data" / "s.tar", [("a", {"png": png(image)})])],
        tmp_path / "data" / "manifest.json",
        "train",
    )
    tiny_artifact(tmp_path / "artifact")
    network = load_autoencoder(tmp_path / "artifact").network
    flips = ["--flips"]
    crops = ["--flips", "--crops", "6", "--crop-scale-min", "0.5"]
    for out, options, names in (
        ("flips", flips, ["center", "mirror"]),
        ("crops", crops, ["center", *(f"crop{n}" for n in range(6))]),
    ):
        report = encode(tmp_path, *options, "--dtype", "float32", out=out)
        assert report["variants"] == names
        members = read_tar(tmp_path / out / "s.tar")["a"]
        record = json.loads(members["latents.json"])["variants"]
        assert list(record) == names
        assert record["center"] == {"box": [8, 0, 32, 24], "flip": False}
        for name, crop in record.items():
            box = crop["box"]
            assert 0 <= box[0] < box[2] <= 40
            assert box[2] - box[0] == pytest.approx(box[3] - box[1])
            assert 12 <= box[3] - box[1] <= 24
            pixels = image.crop(box).resize((16, 16), Image.Resampling.BICUBIC)  # torch's are the same to 1 of 255
            pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop["flip"] else pixels
            x = torch.from_numpy(np.asarray(pixels).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            with torch.no_grad():
                moments = torch.cat(list(network.encode_moments(x)), dim=1)[0].numpy()
            np.testing.assert_allclose(array(members[f"latents.{name}.npy"]), moments, atol=2e-2)
        assert out == "flips" or {crop["flip"] for name, crop in record.items() if name != "center"} == {True, False}


def test_a_second_run_keeps_what_is_done_and_a_part_is_a_mixture(folder: Path) -> None:
    first = encode(folder, "--max-shards", "2")
    assert not first["complete"]
    assert [first["splits"][split]["latent_shards"] for split in ("train", "heldout")] == [2, 0]
    mixture = open_manifest(folder / "cache", "train")
    assert [shard.holds_latents for shard in mixture.shards] == [True, True, False]
    assert open_manifest(folder / "cache", "heldout").latents is None
    before = contents(folder / "cache")
    second = encode(folder)
    assert (second["kept_shards"], second["encoded_shards"], second["complete"]) == (2, 4, True)
    after = contents(folder / "cache")
    assert all(after[name] == content for name, content in before.items() if name != "manifest.json")
    assert encode(folder)["encoded_shards"] == 0
    assert contents(folder / "cache") == after
    assert encode(folder, out="again")["complete"]
    assert contents(folder / "again") == after  # byte for byte


def test_ranks_share_the_shards_and_the_last_one_sees_all(folder: Path) -> None:
    encode(folder, out="alone")
    arguments = [str(folder / "artifact"), str(folder / "data"), "--out", str(folder / "cache"), "--workers", "1"]
    assert run_ranks(encode_main, 4, [*arguments, "--json"]) == [0] * 4
    assert contents(folder / "cache") == contents(folder / "alone")


def _report_of(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """What a rank prints, in words and then as JSON."""
    texts = []
    for options in ([], ["--json"]):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert encode_main([*arguments, *options]) == 0
        texts.append(printed.getvalue())
    return texts[0], json.loads(texts[1] or "{}")


def test_a_rank_of_several_says_that_its_counts_are_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder / "artifact"), str(folder / "data"), "--out", str(folder / "cache"), "--workers", "0"]
    arguments += ["--device", "cpu"]
    launch = Launch(rank=0, world_size=3, local_rank=0, local_world_size=3)
    monkeypatch.setattr(env, "read_launch", lambda: launch)
    text, report = _report_of(arguments)
    assert text.startswith("rank 0 of 3 alone: 16 images in 2 shards encoded")
    assert "1 of 3 shards hold latents so far; other ranks may still be encoding" in text
    assert (report["rank"], report["world_size"], report["counts_of"]) == (0, 3, "this rank")
    assert (report["complete"], report["note"]) == (False, "so far; other ranks may still be encoding")
    monkeypatch.undo()
    text, report = _report_of(arguments)
    assert text.startswith("24 images in 4 shards encoded")
    assert "so far" not in text
    assert (report["rank"], report["world_size"], report["counts_of"]) == (0, 1, "all")
    assert (report["complete"], report["note"]) == (True, "")


def test_who_publishes_looks_once_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(folder, out="whole")
    encode(folder, "--max-shards", "5")
    plain = latent_shards.write_json

    def write(path: Path, content: Any) -> None:
        # Another rank finishes the last shard between our look and our writing.
        for name in ("heldout-000002.tar", "heldout-000002.index.safetensors"):
            if path.name == "manifest.json" and not (folder / "cache" / name).exists():
                shutil.copy(folder / "whole" / name, folder / "cache" / name)
        plain(path, content)

    monkeypatch.setattr(latent_shards, "write_json", write)
    encode(folder, "--max-shards", "5")
    assert all(shard.holds_latents for shard in open_manifest(folder / "cache", "heldout").shards)


def test_what_does_not_decode_keeps_its_place_and_its_reason(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [(f"{n:03d}", make_sample(n, 8, rng)) for n in range(6)]
    samples[1][1]["png"] = broken_png()
    samples[3][1]["txt"] = b"\x81"
    (tmp_path / "data").mkdir()
    index_tars([write_tar(tmp_path / "data" / "s.tar", samples)], tmp_path / "data" / "manifest.json", "train")
    tiny_artifact(tmp_path / "artifact")
    assert encode(tmp_path, "--batch", "2")["unusable"] == 2
    members = read_tar(tmp_path / "cache" / "s.tar")
    assert list(members) == [f"{n:03d}" for n in range(6)]
    assert json.loads(members["001"]["latents.json"]) == {"unusable": "image does not decode"}
    assert json.loads(members["003"]["latents.json"]) == {"unusable": "caption is not text in UTF-8, UTF-16 or cp1252"}
    assert members["003"]["txt"] == b"\x81"
    assert "latents.center.npy" not in members["001"]


SLOW = """
import sys, time
import numpy as np
from ldm_scale.operations import encode
from ldm_scale.encode import main
plain = encode._Encoder._moments
def slow(self, images):
    print("batch", flush=True)
    time.sleep(0.1)
    return plain(self, images)
encode._Encoder._moments = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_in_the_middle_leaves_nothing_that_counts_as_whole(folder: Path, number: signal.Signals) -> None:
    encode(folder, out="alone")
    arguments = [str(folder / "artifact"), str(folder / "data"), "--out", str(folder / "cache"), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments, "--batch", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(6):  # batches of 2: in the middle of the second shard of 8
        process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 0)
    names = set(contents(folder / "cache"))
    assert {name for name in names if name.startswith("train")} == {
        "train-000000.tar",
        "train-000000.index.safetensors",
    }
    assert ("manifest.json" in names) == (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        assert [s.holds_latents for s in open_manifest(folder / "cache", "train").shards] == [True, False, False]
    report = encode(folder)
    assert (report["kept_shards"], report["encoded_shards"]) == (1, 5)
    assert contents(folder / "cache") == contents(folder / "alone")


def test_two_runs_do_not_write_into_one_tar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:

    (folder / "cache").mkdir()
    partial = folder / "cache" / ".train-000000.tar.partial-elsewhere-1"
    with partial.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert refusal(folder, capsys) == (3, True)
        assert "another process is writing this shard" in LAST[-1]
        assert contents(folder / "cache") == {partial.name: b""}


def test_partial_files_of_the_dead_are_removed_and_no_others(folder: Path) -> None:
    cache, host, day = folder / "cache", socket.gethostname(), 86400
    cache.mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    dead, living, now = process.pid, os.getppid(), time.time()
    ages = {
        # Of shards that the next run does not touch.
        f".heldout-000002.tar.partial-{host}-{dead}": 0,
        f".heldout-000002.index.safetensors.partial-{host}-{dead}": 0,
        f".heldout-000001.tar.partial-other-host-{living}": day + 60,
        f".heldout-000001.tar.partial-{host}-{living}": 0,
        f".heldout-000001.tar.partial-other-host-{dead}": day - 60,
        f".heldout-000000.tar.partial-other-host-{dead}": day + 60,  # held, by a clock that is wrong
        f".mine.partial-{host}-{dead}": 0,  # not a name of ours
    }
    for name, age in ages.items():
        (cache / name).write_bytes(b"x")
        os.utime(cache / name, (now - age, now - age))
    with (cache / f".heldout-000000.tar.partial-other-host-{dead}").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        encode(folder, "--max-shards", "1")
    assert {name for name in contents(cache) if name in ages} == set(list(ages)[3:])


def test_a_killed_run_s_partial_files_go_whatever_is_encoded_next(folder: Path) -> None:
    arguments = [str(folder / "artifact"), str(folder / "data"), "--out", str(folder / "cache"), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)  # so that it lives and gets no further
    (partial,) = contents(folder / "cache")
    assert partial == f".train-000000.tar.partial-{socket.gethostname()}-{process.pid}"
    encode(folder, "--split", "heldout", "--max-shards", "1")
    assert partial in contents(folder / "cache")  # it lives
    process.kill()
    process.communicate(timeout=60)
    encode(folder, "--split", "heldout", "--max-shards", "1")
    assert not [name for name in contents(folder / "cache") if "partial" in name]


LAST: list[str] = []


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *options: str, out: str = "cache") -> tuple[int, bool]:
    """Exit status and whether exactly one line says why (kept in LAST)."""
    arguments = [str(folder / "artifact"), str(folder / "data" / "manifest.json"), "--out", str(folder / out)]
    capsys.readouterr()
    status = main(["encode", *arguments, "--device", "cpu", "--workers", "0", *options])
    output, errors = capsys.readouterr()
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    LAST.append(errors)
    return status, len(lines) == 1 and output == "" and "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--resolution", "17"], 2, "--resolution 17: must be a multiple of the artifact's f=2; give 16 or 18"),
        (["--crops", "2"], 2, "--crops 2 with --crop-scale-min 1"),
        (["--crop-scale-min", "0.5"], 2, "--crops 0 with --crop-scale-min 0.5"),
        (["--split", "test"], 3, "--split test: "),
        (["--out", "data"], 3, "--out {folder}/data: the images lie there"),
    ],
)
def test_arguments_that_cannot_be(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    out = options[1] if options[0] == "--out" else "cache"
    before = contents(folder / "data")
    assert refusal(folder, capsys, *(options if options[0] != "--out" else []), out=out) == (status, True)
    assert message.format(folder=folder) in LAST[-1]
    assert contents(folder / "data") == before


def test_another_transform_artifact_or_source_asks_for_another_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(folder, "--max-shards", "1")
    for options in (["--flips"], ["--resolution", "8"], ["--dtype", "float32"]):
        assert refusal(folder, capsys, *options) == (3, True)
        assert "train-000000.tar: encoded by artifact" in LAST[-1]
        assert "choose another --out" in LAST[-1]
    (folder / "artifact").rename(folder / "old")
    other_artifact(folder / "artifact")
    assert refusal(folder, capsys) == (3, True)
    assert "train-000000.tar: encoded by artifact" in LAST[-1]
    (folder / "artifact").rename(folder / "other")
    (folder / "old").rename(folder / "artifact")
    (folder / "data").rename(folder / "olddata")
    make_dataset(folder / "data", 20, 8, 20, seed=1, splits=("train", "heldout"))
    assert refusal(folder, capsys) == (3, True)
    assert "train-000000.tar: encoded from another train-000000.tar (sha256" in LAST[-1]


def test_a_stage_1_checkpoint_or_unfinished_run_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = read_artifact(folder / "artifact")
    config = Config(stage="autoencoder", autoencoder=made.config, data=DataConfig(resolution=16))
    run = folder / "run"
    checkpoint = run / "checkpoints" / "images-0000000064"
    write_checkpoint(checkpoint, config, "autoencoder", {"weight": made.state | {OUTPUT_LOGVAR: torch.zeros(1)}})
    (folder / "artifact").rename(folder / "made")
    for place, what in ((checkpoint, "a stage-1 checkpoint"), (run, "a stage-1 run that is not finished")):
        (folder / "artifact").unlink(missing_ok=True)
        (folder / "artifact").symlink_to(place)
        assert refusal(folder, capsys) == (4, True)
        assert f"{folder / 'artifact'} is {what}, whose hash no artifact will have" in LAST[-1]
        assert "finish the run first" in LAST[-1]
        assert not (folder / "cache").exists()
    (folder / "made").rename(run / "artifact")
    assert encode(folder, "--max-shards", "1")["artifact_sha256"] == made.content_hash


def test_damage_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder / "data" / "train-000001.tar"
    data = bytearray(source.read_bytes())
    data[700] ^= 1
    source.write_bytes(data)
    assert refusal(folder, capsys) == (3, True)
    assert f"{source}: its sha256 is" in LAST[-1]
    tar = folder / "cache" / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert refusal(folder, capsys) == (3, True)
    assert f"{tar}: " in LAST[-1]
    assert "bytes, but its index says" in LAST[-1]


def test_moments_beyond_float16_name_shard_and_key(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = encode_operation._Encoder._moments
    for value, message in ((1e5, "a moment of 100000 lies outside float16"), (np.nan, "moments that are not finite")):

        def spoilt(self: object, images: np.ndarray, value: float = value) -> np.ndarray:
            moments = plain(self, images)  # type: ignore[arg-type]
            moments[5, 0, 0, 0] = value
            return moments

        monkeypatch.setattr(encode_operation._Encoder, "_moments", spoilt)
        assert refusal(folder, capsys, "--batch", "8") == (3, True)
        assert "train-000000/train00005 (center): " in LAST[-1]
        assert message in LAST[-1]
        assert not list((folder / "cache").iterdir())
    monkeypatch.undo()
    assert encode(folder, "--dtype", "float32")["complete"]


def test_started_as_a_script_it_prints_json_and_nothing_else(folder: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, "ldm_scale/encode.py", str(folder / "artifact"), str(folder / "data")]
    result = subprocess.run(
        [*command, "--out", str(folder / "cache"), "--json", "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout)["complete"]
    assert "images/s" in result.stderr
    assert time.monotonic() - started < 60
