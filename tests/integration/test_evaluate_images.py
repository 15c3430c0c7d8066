"""`ldm-scale evaluate images` end to end: folders, arrays, feature files, the cache, records, mistakes in one line."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_scale.__main__ import main
from ldm_scale.evaluation.feature_sets import read_features, write_features
from ldm_scale.evaluation.features import EfficientNetFeatures
from ldm_scale.operations import evaluation_setup
from tests.helpers.inception import write_inception
from tests.helpers.scenes import make_squares
from tests.helpers.towers import TINY_MODEL, tiny_tower

NUM_SAMPLES, NUM_REFERENCE, SIDE = 40, 36, 16


@pytest.fixture(scope="module", autouse=True)
def one_network() -> Iterator[None]:
    """Features are opened once for the file, not for each command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_setup, "EfficientNetFeatures", functools.cache(EfficientNetFeatures))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "ldm-scale" / "features"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("reference"), NUM_REFERENCE, SIDE)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured noise, each with a caption."""
    folder = tmp_path_factory.mktemp("samples")
    generator = np.random.default_rng(1)
    for number in range(NUM_SAMPLES):
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        small.resize((SIDE, SIDE)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")
    return folder


def command(source: Path, data: Path, *arguments: str | Path) -> list[str]:
    return ["evaluate", "images", str(source), "--data", str(data), "--device", "cpu", *map(str, arguments)]


def measure(capsys: pytest.CaptureFixture[str], source: Path, data: Path, *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*command(source, data, *arguments), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    document: dict[str, Any] = json.loads(out)
    return document


def values(document: dict[str, Any]) -> dict[str, float]:
    return {name: found["value"] for name, found in document["figures"]["samples"].items() if "value" in found}


def test_figures_do_not_depend_on_batch_cache_or_form(
    samples: Path, reference: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = measure(capsys, samples, reference, "--out", tmp_path / "a")
    assert first == json.loads((tmp_path / "a" / "result.json").read_text())
    (entry,) = cache.iterdir()
    cached = measure(capsys, samples, reference, "--batch", "7")
    again = measure(capsys, samples, reference, "--batch", "9", "--no-cache")
    from_file = measure(capsys, samples, entry)
    array = np.stack([np.asarray(Image.open(path)) for path in sorted(samples.glob("*.png"))])
    np.savez(tmp_path / "images.npz", array)
    as_array = measure(capsys, tmp_path / "images.npz", reference)
    for other in (cached, again, from_file, as_array):
        assert values(other) == pytest.approx(values(first), rel=1e-4)
        assert other["protocol"] == first["protocol"]
    assert set(values(first)) == {"frechet", "kernel", "precision", "recall", "density", "coverage"}
    assert list(cache.iterdir()) == [entry]


def test_every_figure_is_a_record(samples: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = measure(capsys, samples, reference)
    record = next(record for record in document["records"] if record["figure"] == "samples.kernel")
    assert record["name"] == "KD-EffNetLite0"
    assert record["interval"]["low"] < record["value"] < record["interval"]["high"]
    assert (record["n"], record["n_reference"]) == (NUM_SAMPLES, NUM_REFERENCE)
    assert record["extractor"].startswith("EfficientNet-Lite0")
    assert len(record["extractor_sha256"]) == 64
    assert record["resizer"] == "bilinear, antialiased"
    assert record["reference"] == document["protocol"]["samples"]["reference"]["pixels_digest"]
    assert record["sampler"] is record["weights"] is None
    assert record["command"].startswith(f"ldm-scale evaluate images {samples} --data {reference}")
    assert record["versions"]["torch-fidelity"]
    assert {record["protocol_sha256"] for record in document["records"]} == {record["protocol_sha256"]}


def test_equal_sets_are_at_distance_zero(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(measure(capsys, samples, samples))
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_people_get_a_table_with_intervals(samples: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(samples, reference)) == 0
    out = capsys.readouterr().out
    assert "FD-EffNetLite0-PCA32 to the reference" in out
    assert "coverage (EffNetLite0)" in out
    assert "samples.reference.num_images" in out
    assert "]" in next(line for line in out.splitlines() if line.startswith("KD-EffNetLite0"))


def test_inception_and_clip_with_weights_from_files(
    samples: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inception(tmp_path / "inception.pth")
    clip = tiny_tower(tmp_path).weights
    arguments = ["--features", "inception_v3", "--features-weights", tmp_path / "inception.pth"]
    arguments += ["--num-images", "22", "--num-reference", "8"]
    arguments += ["--clip-model", TINY_MODEL, "--clip-weights", clip]
    document = measure(capsys, samples, reference, *arguments)
    found = document["figures"]["samples"]
    digest = document["protocol"]["samples"]["extractor"]["weights_sha256"]
    assert found["frechet"]["name"] == f"FD-InceptionV3-{digest[:8]}", "other weights than FID's are not FID"
    assert "22 samples" not in found["frechet"]["warning"]
    assert "8 reference images in 2048 dimensions span 7 of them alone" in found["frechet"]["warning"]
    assert 1 <= found["inception_score"]["value"] <= 1008
    assert found["inception_score"]["name"] == f"IS-InceptionV3-{digest[:8]}"
    assert 0 <= found["clip_score"]["value"] <= 1
    assert found["clip_score"]["num_images"] == 22
    record = next(record for record in document["records"] if record["figure"] == "samples.clip_score")
    assert record["extractor"] == f"OpenCLIP {TINY_MODEL}"


def test_other_protocols_are_not_compared(
    samples: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--resamples", "0")
    measure(capsys, samples, reference, "--out", tmp_path / "a", *quick)
    measure(capsys, samples, samples, "--out", tmp_path / "b", *quick)
    measure(capsys, samples, reference, "--num-images", "39", "--out", tmp_path / "c", *quick)
    measure(capsys, samples, reference, "--out", tmp_path / "d", "--resamples", "4")
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert main(["evaluate", "compare", a, d]) == 0
    assert "KD-EffNetLite0" in capsys.readouterr().out
    for other, expected in ((b, "data.pixels_digest is"), (c, "samples.num_samples is 40 and 39")):
        assert main(["evaluate", "compare", a, other]) == 2
        assert expected in capsys.readouterr().err


def test_corrupt_images_are_left_out_unless_a_number_was_asked_for(
    samples: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in samples.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 50 if path.stem == "007" else None])
    document = measure(capsys, tmp_path, reference, "--resamples", "0")
    assert document["bad_images"]["names"] == {"007.png": "image is cut short"}
    assert document["protocol"]["samples"]["num_samples"] == NUM_SAMPLES - 1
    assert document["records"][0]["n"] == NUM_SAMPLES - 1
    assert main(command(tmp_path, reference, "--num-images", "40")) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--num-images 40: of these images 39 can be used" in line
    assert "007.png" in line
    for left_out in ("", "those of the cache"):
        assert main(command(samples, tmp_path, "--resamples", "0")) == 0, left_out
        assert main(command(samples, tmp_path, "--num-reference", "40")) == 3, left_out
        assert "--num-reference 40: of these images 39 can be used" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_cache_entry_is_taken_again(
    samples: Path, reference: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = measure(capsys, samples, reference, "--resamples", "0")
    (entry,) = cache.iterdir()
    content = bytearray(entry.read_bytes())
    content[-5] ^= 64
    entry.write_bytes(content)
    assert main([*command(samples, reference, "--resamples", "0"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"cache: {entry}: this feature file is damaged" in err
    assert values(json.loads(out)) == pytest.approx(values(first), rel=1e-6)
    assert bytes(content) != entry.read_bytes()


def test_changed_bytes_of_the_reference_are_seen(
    samples: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same name and size: no date or size tells."""
    pictures = tmp_path / "reference"
    pictures.mkdir()
    for number in range(8):
        Image.new("RGB", (SIDE, SIDE), (10 * number, 0, 0)).save(pictures / f"{number}.png", compress_level=0)
    first = measure(capsys, samples, pictures, "--resamples", "0")
    size = (pictures / "3.png").stat().st_size
    Image.new("RGB", (SIDE, SIDE), (77, 0, 0)).save(pictures / "3.png", compress_level=0)
    assert (pictures / "3.png").stat().st_size == size
    second = measure(capsys, samples, pictures, "--resamples", "0")
    assert len(list(cache.iterdir())) == 2
    assert first["protocol"]["data"]["pixels_digest"] != second["protocol"]["data"]["pixels_digest"]


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--num-images", "41"], 2, "has 40 images; give 1 to 40"),
        (["--num-reference", "37"], 2, "error: --num-reference 37: "),
        (["--num-reference", "37"], 2, "has 36 images in its split heldout; give 1 to 36"),
        (["--split", "test"], 3, "no split 'test'"),
        (["--resamples", "1"], 2, "--resamples 1: must be 2 or more, or 0"),
        (["--resolution", "0"], 2, "--resolution 0"),
        (["--batch", "0"], 2, "--batch 0"),
        (["--features", "inception_v3"], 2, "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"),
        (["--features", "inception_v3", "--features-weights", "BAD"], 2, "does not hold"),
        (["--clip-weights", "BAD"], 2, "cannot be loaded into ViT-B-32"),
        (["--clip-model", "ViT-B-32"], 2, "add --clip-weights"),
        (["--cache", "BAD"], 2, "is a file; give a folder"),
        (["--out", "BAD"], 2, "is a file; give a folder for result.json"),
        (["--out", "RESULT"], 2, "holds a result.json already; give another folder, or --overwrite"),
    ],
)
def test_mistakes_are_one_line(
    samples: Path,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    expected: str,
) -> None:
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "result.json").write_text("{}")
    if "BAD" in arguments and "--clip-weights" in arguments:
        tiny_tower(tmp_path)
        arguments = [*arguments, "--clip-model", TINY_MODEL]
        expected = expected.replace("ViT-B-32", "tiny")
    places = {"BAD": str(tmp_path / "bad.pth"), "RESULT": str(tmp_path / "result")}
    assert main(command(samples, reference, *(places.get(a, a) for a in arguments))) == status
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    assert expected in line


def test_what_is_no_set_of_images_is_refused(
    samples: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "floats.npz", np.full((40, 8, 8, 3), np.nan, np.float32))
    np.savez(tmp_path / "two.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:60])
    np.savez(tmp_path / "pickle.npz", np.array([{}], dtype=object))
    (tmp_path / "sizes").mkdir()
    for side in (16, 24):
        Image.new("RGB", (side, side)).save(tmp_path / "sizes" / f"{side}.png")
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "wide" / "0.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"x")
    (tmp_path / "other.safetensors").write_bytes(b"x")
    for source, expected in {
        "floats.npz": "arr_0 is float32 of shape (40, 8, 8, 3), expected pictures: uint8",
        "two.npz": "holds mu, sigma; pictures are looked for in arr_0",
        "cut.npz": "cannot be read",
        "pickle.npz": "cannot be read",
        "none.npz": "no such file",
        "sizes": "pixels where others have",
        "wide": "0.png has 20x10 pixels, and squares are measured; give --resolution",
        "bad": "none of 1 images can be read as a picture",
        "absent": "no such manifest or folder",
    }.items():
        assert main(command(tmp_path / source, reference)) == 3, source
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error:")
        assert expected in line, line
    assert main(command(samples, tmp_path / "other.safetensors")) == 3
    assert "other.safetensors: this feature file cannot be read" in capsys.readouterr().err


def test_features_of_other_pixels_are_refused(
    samples: Path, reference: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(capsys, samples, reference, "--num-images", "6", "--resamples", "0")
    (entry,) = cache.iterdir()
    arguments = ["--num-images", "6", "--resamples", "0"]
    assert main(command(samples, entry, *arguments, "--resolution", "24")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "its features are of images of another resolution, 16 where the samples' is 24" in line
    features = read_features(entry)
    for name, value in (("crop", "none"), ("decoder", "Pillow 1")):
        changed = features.images | {"wanted": features.images["wanted"] | {name: value}}
        write_features(tmp_path / f"{name}.safetensors", replace(features, images=changed))
    assert main(command(samples, tmp_path / "crop.safetensors", *arguments)) == 2
    assert "another crop, 'none' where the samples' is" in capsys.readouterr().err.splitlines()[-1]
    document = measure(capsys, samples, tmp_path / "decoder.safetensors", *arguments)
    assert document["protocol"]["data"]["decoder"] == "Pillow 1"


def test_features_of_another_extractor_are_refused(
    samples: Path, reference: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(capsys, samples, reference, "--num-images", "6", "--resamples", "0")
    (entry,) = cache.iterdir()
    write_inception(tmp_path / "inception.pth")
    arguments = ["--features", "inception_v3", "--features-weights", tmp_path / "inception.pth", "--num-images", "2"]
    assert main(command(samples, entry, *arguments)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "come from different extractors: network is" in line
    assert main(command(samples, entry, "--num-reference", "3")) == 2
    assert "is a feature file, of which all is used" in capsys.readouterr().err.splitlines()[-1]
