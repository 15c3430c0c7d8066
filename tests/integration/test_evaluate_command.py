"""`ldm-scale evaluate` end to end: figures of an artifact, results compared and drawn, mistakes in one line."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.__main__ import main
from tests.helpers.evaluations import kl_result, vq_result
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_dataset, make_sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for 16 px, and data of 40 held-out images of 32 px."""
    directory = tmp_path_factory.mktemp("evaluate")
    tiny_artifact(directory / "artifact")
    make_dataset(directory / "data", num_samples=40, splits=("train", "heldout"))
    return directory


def run(*arguments: str | Path) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    (line,) = printed.getvalue().splitlines()
    document: dict[str, Any] = json.loads(line)
    return document


def test_an_artifact_is_measured_compared_and_drawn(folder: Path) -> None:
    out = folder / "a"
    document = run(
        "autoencoder",
        folder / "artifact",
        "--data",
        folder / "data",
        "--num-images",
        "40",
        "--out",
        out,
        "--device",
        "cpu",
    )
    assert document == json.loads((out / "result.json").read_text())
    figures, protocol = document["figures"], document["protocol"]
    assert figures["perceptual"]["name"] == "EffNetLite0-distance"
    assert figures["frechet"]["name"] == "FD-EffNetLite0-PCA32"
    assert figures["frechet"]["distance"] > 0
    assert figures["frechet"]["not_measured"] == "halves of 40 images have fewer than 33"
    assert 0 < figures["rate"]["kl_bits_per_pixel_fitted"] < figures["rate"]["kl_bits_per_pixel"]
    assert protocol["data"]["num_images"] == 40
    assert protocol["data"]["split"] == "heldout"
    assert protocol["resolution"] == 16
    assert document["model"]["weights"] == "raw"
    assert document["model"]["label"] == "kl-f2-c3"
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.size == (8 * 18 - 2, 4 * 18 - 2)  # two rows of originals, each above its reconstructions

    other = run("autoencoder", folder / "artifact", "--data", folder / "data", "--batch", "7", "--out", folder / "b")
    assert other["protocol"] == protocol
    compared = run("compare", out, folder / "b" / "result.json")
    assert compared["protocol"] == protocol
    assert [result["model"]["label"] for result in compared["results"]] == ["kl-f2-c3"] * 2
    drawn = run("rate-distortion", out, folder / "b", "--out", folder / "plot.png")
    # In the order of their rates, which other batches round differently.
    assert sorted(row["label"] for row in drawn["models"]) == ["kl-f2-c3 a", "kl-f2-c3 b"]
    with Image.open(folder / "plot.png") as picture:
        picture.verify()


def test_a_folder_of_images_with_a_bad_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(make_sample(i, 32, generator)["png"])
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    assert main(["evaluate", "autoencoder", str(folder / "artifact"), "--data", str(tmp_path), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "left out: 1 images\n  bad.jpg: image does not decode" in out
    assert "FD-EffNetLite0-PCA32: 3 images, at least 33 are needed" in out
    assert "data.num_images            3" in out
    assert "skipped 1 samples (1 x image does not decode), such as bad.jpg" in err
    arguments = ["evaluate", "autoencoder", str(folder / "artifact"), "--data", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--num-images", "4"]) == 3, "fewer than were asked for"
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--num-images 4: of these images 3 can be used at most (skipped 1 samples (1 x image does not" in line
    assert "bad.jpg" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bad.png").write_bytes(b"")
    assert main(["evaluate", "autoencoder", str(folder / "artifact"), "--data", str(tmp_path / "other")]) == 3
    assert "none of 1 images can be used" in capsys.readouterr().err.splitlines()[-1]


def test_figures_follow_the_protocols_resolution(folder: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "autoencoder", str(folder / "artifact"), "--data", str(folder / "data"), "--device", "cpu"]
    for resolution in ("16", "32"):
        out = tmp_path / resolution
        assert main([*arguments, "--num-images", "4", "--resolution", resolution, "--out", str(out)]) == 0
    assert main(["evaluate", "compare", str(tmp_path / "16"), str(tmp_path / "32")]) == 2


def test_different_protocols_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = vq_result()
    other["protocol"]["data"]["num_images"] = 50
    for name, document in (("a", kl_result()), ("b", vq_result()), ("c", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    assert main(["evaluate", "compare", a, b]) == 0
    assert "vq-f8-n256-c4" in capsys.readouterr().out
    for command in (["compare", a, b, c], ["rate-distortion", a, c, "--out", str(tmp_path / "plot.png")]):
        assert main(["evaluate", *command]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "data.num_images is 100 and 50" in err
    assert not (tmp_path / "plot.png").exists()
    assert main(["evaluate", "compare", a]) == 2
    assert "give two or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--split", "test"], 3, "no split 'test'; it has: heldout, train (--split)"),
        (["--num-images", "0"], 2, "--num-images 0: "),
        (["--num-images", "41"], 2, "has 40 images in its split heldout; give 1 to 40"),
        (["--batch", "0"], 2, "--batch 0: must be at least 1"),
        (["--resolution", "17"], 2, "--resolution 17: must be a multiple of the model's f = 2"),
        (["--resolution", "8"], 2, "at least 11 pixels"),
        (["--weights", "ema"], 2, "holds raw weights alone"),
        (["--features", "inception_v3"], 2, "inception_v3 needs"),
        (["--features-weights", "x.pth"], 2, "add --features inception_v3"),
        (["--perceptual", "lpips_vgg", "--perceptual-weights", "x.pth"], 2, "no file x.pth"),
        (["--perceptual-weights", "x.pth"], 2, "set --perceptual to lpips_vgg"),
        (["--out", "FILE"], 2, "is a file; give a folder"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    expected: str,
) -> None:
    (tmp_path / "file").touch()
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in arguments]
    command = ["evaluate", "autoencoder", str(folder / "artifact"), "--data", str(folder / "data"), *arguments]
    assert main(command) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert expected in err


def test_names_that_are_no_text_are_printed(tmp_path: Path) -> None:
    """In most languages' locales, stdout takes text alone."""
    for name in ("caf\udce9", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(kl_result()))
    done = subprocess.run(
        [sys.executable, "-m", "ldm_scale", "evaluate", "compare", tmp_path / "caf\udce9", tmp_path / "other"],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert r"kl-f4-c3 caf\udce9" in done.stdout


@pytest.mark.parametrize("action", ["autoencoder", "diffusion", "images", "sweep"])
def test_the_place_is_tried_before_anything_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    """There is neither a model nor data, which would be the next thing to be said."""
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "below", Path("/proc/a")):
        assert (
            main(["evaluate", action, str(tmp_path / "none"), "--data", str(tmp_path / "no"), "--out", str(out)]) == 2
        )
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: --out {out}: nothing can be written there"), line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "autoencoder", str(tmp_path), "--data", str(folder / "data")]) == 4
    assert "holds no artifact" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_what_a_cpu_does(folder: Path, tmp_path: Path) -> None:
    documents = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        arguments = ["--data", str(folder / "data"), "--device", device, "--out", str(out)]
        assert main(["evaluate", "autoencoder", str(folder / "artifact"), *arguments]) == 0
        documents.append(json.loads((out / "result.json").read_text()))
    cpu, cuda = documents
    assert cpu["protocol"] == cuda["protocol"]
    assert cuda["figures"]["psnr_db"]["mean"] == pytest.approx(cpu["figures"]["psnr_db"]["mean"], abs=0.01)
    assert cuda["figures"]["frechet"]["distance"] == pytest.approx(cpu["figures"]["frechet"]["distance"], rel=0.01)
