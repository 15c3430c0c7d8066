"""`ldm-scale evaluate diffusion` end to end: every kind of conditioning, known answers, mistakes in one line."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_scale.__main__ import main
from ldm_scale.conditioning.base import Conditions
from ldm_scale.config.schema import (
    ClassConditioningConfig,
    ConditioningConfig,
    InpaintingConditioningConfig,
    LayoutConditioningConfig,
    LowResolutionConditioningConfig,
    SemanticMapConditioningConfig,
)
from ldm_scale.data import open_manifest
from ldm_scale.evaluation.features import EfficientNetFeatures
from ldm_scale.interchange.load import LoadedDiffusion
from ldm_scale.operations import evaluate_diffusion, evaluation_setup
from tests.helpers.models import SIDE, tiny_model
from tests.helpers.runs import TEXT, tiny_artifact
from tests.helpers.scenes import make_squares
from tests.helpers.towers import TINY_MODEL, tiny_tower

NUM_IMAGES = 36
INPAINTING = InpaintingConditioningConfig(masks="thick")
KINDS = {
    "nothing": ConditioningConfig(),
    "text": ConditioningConfig(text=TEXT),
    "classes": ConditioningConfig(classes=ClassConditioningConfig(num_classes=3, width=16)),
    "layout": ConditioningConfig(
        layout=LayoutConditioningConfig(num_classes=3, num_tokens=64, max_objects=2, width=16, depth=1, num_heads=2)
    ),
    "map": ConditioningConfig(semantic_map=SemanticMapConditioningConfig(num_labels=4)),
    "small": ConditioningConfig(low_resolution=LowResolutionConditioningConfig(factor=4)),
    "fill": ConditioningConfig(text=TEXT, inpainting=INPAINTING),
}


@pytest.fixture(scope="module", autouse=True)
def one_network() -> Iterator[None]:
    """Features are opened once for the file, not for each command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_setup, "EfficientNetFeatures", functools.cache(EfficientNetFeatures))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"), NUM_IMAGES, SIDE)


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    labels = open_manifest(data, "heldout").labels
    return {name: tiny_model(tmp_path_factory.mktemp(name), kinds, labels) for name, kinds in KINDS.items()}


def command(source: Path, data: Path, *arguments: str | Path) -> list[str]:
    return ["evaluate", "diffusion", str(source), "--data", str(data), "--device", "cpu", *map(str, arguments)]


def measure(capsys: pytest.CaptureFixture[str], source: Path, data: Path, *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*command(source, data, *arguments), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    document: dict[str, Any] = json.loads(out)
    return document


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_measured_and_shown(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    document = measure(capsys, models[name], data, "--num-images", "6", "--steps", "2", "--out", tmp_path)
    assert document == json.loads((tmp_path / "result.json").read_text())
    kinds = document["model"]["conditioning"]
    assert set(document["figures"]) == {"frechet", "samples", *kinds}
    assert document["figures"]["frechet"]["not_measured"] == "6 images, at least 33 are needed"
    assert document["figures"]["samples"]["frechet"]["not_measured"] == "6 samples, at least 33 are needed"
    assert document["figures"]["samples"]["precision"]["interval"] is None
    assert set(document["protocol"]["given"]) == set(kinds)
    assert document["model"]["label"].startswith(f"{'+'.join(kinds) or 'unconditional'} ddim-2")
    guided = name in ("text", "classes", "layout", "fill")
    assert document["model"]["sampling"]["guidance_scale"] == (2.0 if guided else 1.0)
    with Image.open(tmp_path / "samples.png") as picture:
        drawn = 3 if name in ("layout", "map", "small", "fill") else 2
        assert picture.width == 12 + min(6, 1600 // (drawn * 100 + 12)) * (drawn * 100 - 4 + 12)


def test_people_get_a_table(models: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(models["small"], data, "--num-images", "3", "--steps", "1")) == 0
    out = capsys.readouterr().out
    assert "FD-EffNetLite0-PCA32: 3 images, at least 33 are needed" in out
    assert "low resolution: SSIM of bicubic" in out
    assert "given.low_resolution.degradation  bicubic" in out


def test_figures_do_not_depend_on_the_batch(
    models: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [
        measure(capsys, models["fill"], data, "--num-images", "8", "--steps", "2", "--batch", batch)
        for batch in ("8", "3")
    ]
    assert documents[0]["protocol"] == documents[1]["protocol"]
    first, second = (document["figures"]["inpainting"] for document in documents)
    assert first["hole_psnr_db"]["mean"] == pytest.approx(second["hole_psnr_db"]["mean"], abs=0.01)
    assert first["mean_colour_psnr_db"] == second["mean_colour_psnr_db"]
    assert first["known_exact"]["mean"] == 1.0


def real_images(model: LoadedDiffusion, y: Conditions, seeds: list[int], **_: Any) -> Tensor:
    """In the place of a sampler: the very images whose y it is given."""
    assert y.images is not None
    assert len(y.images) == len(seeds)
    return y.images


def test_real_images_in_the_place_of_samples(
    models: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_diffusion, "sample_images", real_images)
    count = {"nothing": NUM_IMAGES}  # as many as a Frechet distance needs
    figures = {
        name: measure(capsys, models[name], data, "--num-images", str(count.get(name, 12)))["figures"] for name in KINDS
    }
    assert figures["nothing"]["frechet"]["distance"] == pytest.approx(0, abs=1e-6)
    assert figures["nothing"]["frechet"]["reconstructions"] > 1
    small, fill = figures["small"]["low_resolution"], figures["fill"]["inpainting"]
    assert small["exact_images"] == fill["exact_images"] == 12
    assert small["ssim"]["mean"] == pytest.approx(1)
    assert small["bicubic_ssim"]["mean"] < 0.9
    assert small["psnr_db"]["mean"] is None
    # An untrained autoencoder's, which lies below filling in by any colour.
    assert small["reconstruction_psnr_db"]["mean"] < small["bicubic_psnr_db"]["mean"]
    assert fill["reconstruction_psnr_db"]["mean"] < 20
    assert small["bicubic_psnr_db"]["mean"] < 25
    assert fill["known_exact"]["mean"] == 1
    assert fill["mean_colour_psnr_db"]["mean"] < 20
    layout, labels = figures["layout"]["layout"], figures["map"]["semantic_map"]
    assert layout["iou"] == layout["real_iou"] > 0.9
    assert layout["shuffled_iou"] < 0.7
    assert labels["miou"] == labels["real_miou"] > 0.9
    assert labels["shuffled_miou"] < 0.8
    for name, kind in (("text", "text"), ("classes", "classes")):
        found = figures[name][kind]
        assert found["agreement"] == 1
        assert found["chance"] == pytest.approx(1 / 3, abs=0.1)
        assert found["num_labels"] == 3


def test_grey_in_the_place_of_samples(
    models: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        evaluate_diffusion, "sample_images", lambda model, y, seeds, **_: torch.zeros(len(seeds), 3, SIDE, SIDE)
    )
    figures = {
        name: measure(capsys, models[name], data, "--num-images", "12")["figures"]
        for name in ("layout", "map", "fill", "text")
    }
    assert figures["layout"]["layout"]["iou"] < 0.5 < figures["layout"]["layout"]["real_iou"]
    assert figures["map"]["semantic_map"]["miou"] < 0.7
    assert figures["fill"]["inpainting"]["known_exact"]["mean"] == 0
    assert figures["text"]["text"]["agreement"] == pytest.approx(1 / 3, abs=0.2), "one real image is nearest to all"


def test_results_are_compared_under_one_protocol(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, arguments in {"a": [], "b": ["--guidance", "1"], "c": ["--seed", "1"]}.items():
        measure(capsys, models["text"], data, "--num-images", "4", "--steps", "1", "--out", tmp_path / name, *arguments)
    measure(capsys, models["classes"], data, "--num-images", "4", "--steps", "1", "--out", tmp_path / "d")
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert main(["evaluate", "compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "text ddim-1 w=2" in out
    assert "text: nearest real image agrees" in out
    for other, expected in ((c, "seed is 0 and 1"), (d, "given.text.judged is")):
        assert main(["evaluate", "compare", a, other]) == 2
        assert expected in capsys.readouterr().err
    assert main(["evaluate", "rate-distortion", a, b, "--out", str(tmp_path / "plot.png")]) == 3
    assert "not a result of `ldm-scale evaluate autoencoder`" in capsys.readouterr().err


def test_what_cannot_be_used_is_left_out_and_named(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_squares(tmp_path / "data", 5, SIDE, bad=2)
    document = measure(capsys, models["layout"], data, "--steps", "1")
    assert document["protocol"]["data"]["num_images"] == 3
    assert document["bad_images"]["reasons"] == {"image does not decode": 2}
    assert document["figures"]["layout"]["num_objects"] == 3
    asked = command(models["layout"], data, "--num-images", "5")
    assert main([*asked, "--steps", "1"]) == 3, "fewer than were asked for"
    assert "can be used at most (skipped" in capsys.readouterr().err.splitlines()[-1]
    none = make_squares(tmp_path / "none", 2, SIDE, bad=2)
    assert main(command(models["nothing"], none)) == 3
    assert "none of 2 images can be used" in capsys.readouterr().err.splitlines()[-1]


def test_boxes_without_maps_are_not_judged(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in data.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads(data.read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"map_labels": []}))
    document = measure(capsys, models["layout"], tmp_path, "--num-images", "3", "--steps", "1")
    assert document["figures"]["layout"] == {
        "not_measured": "the data have no maps, which would tell the colours of the boxes' classes"
    }


@pytest.mark.parametrize(
    ("name", "arguments", "status", "expected"),
    [
        ("text", ["--split", "test"], 3, "no split 'test'; it has: heldout (--split)"),
        ("text", ["--num-images", "37"], 2, "has 36 images in its split heldout; give 1 to 36"),
        ("text", ["--batch", "0"], 2, "--batch 0"),
        ("text", ["--steps", "0"], 2, "--steps 0"),
        ("text", ["--guidance", "-1"], 2, "--guidance -1"),
        ("nothing", ["--guidance", "2"], 2, "guidance_scale=2: the model was never trained without"),
        ("text", ["--sampler", "euler"], 2, "euler"),
        ("text", ["--weights", "ema"], 2, "holds raw weights alone"),
        ("text", ["--features", "inception_v3"], 2, "inception_v3 needs"),
        ("text", ["--out", "FILE"], 2, "is a file; give a folder"),
        ("text", ["--data", "FOLDER"], 3, "then give its manifest.json as --data"),
        ("text", ["--seed", "-1"], 2, "--seed -1: must be from 0"),
    ],
)
def test_mistakes_are_one_line(
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    status: int,
    expected: str,
) -> None:
    (tmp_path / "file").touch()
    places = {"FILE": str(tmp_path / "file"), "FOLDER": str(tmp_path)}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert main(command(models[name], data, *arguments)) == status
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    assert expected in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"object_classes": ["red", "blue", "green"]}, "number 1 is 'blue' where the model knows 'green'"),
        ({"object_classes": ["red", "green"]}, "number 2 is nothing where the model knows 'blue'"),
        ({"object_classes": []}, "lists no object_classes, and the model is conditioned on layout"),
    ],
)
def test_data_of_other_names_are_refused(
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    expected: str,
) -> None:
    for path in data.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(data.read_text()) | change))
    assert main(command(models["layout"], tmp_path)) == 2
    assert expected in capsys.readouterr().err
    assert main(command(models["text"], tmp_path, "--num-images", "1", "--steps", "1")) == 0, "it knows no such names"


def test_an_autoencoder_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tiny_artifact(tmp_path / "artifact"), data)) == 4
    assert "holds an autoencoder, expected a diffusion model" in capsys.readouterr().err


def test_the_picture_shows_what_was_given(
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate_diffusion, "sample_images", real_images)
    measure(capsys, models["map"], data, "--num-images", "1", "--out", tmp_path)
    with Image.open(tmp_path / "samples.png") as picture:
        pixels = np.asarray(picture).astype(int)
    top = 12 + 16 + 4
    labels, sample, real = (pixels[top : top + 96, 12 + i * 100 : 108 + i * 100] for i in range(3))
    np.testing.assert_array_equal(sample, real)
    # Where the map has the square's colour, the picture has a square.
    squares = np.abs(sample - 128).max(axis=2) > 40
    colours = {tuple(colour) for colour in labels.reshape(-1, 3)}
    assert len(colours) == 2
    assert squares.mean() == pytest.approx(0.25)
    assert len({tuple(colour) for colour in labels[squares]}) == 1
    assert len({tuple(colour) for colour in labels[~squares]}) == 1


def test_samples_are_set_beside_another_reference(
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate_diffusion, "sample_images", real_images)
    clip = tiny_tower(tmp_path).weights
    other = make_squares(tmp_path / "other", 40, SIDE)
    arguments = ["--cache", tmp_path / "cache", "--reference", other, "--num-reference", "38", "--num-images", "8"]
    arguments += ["--clip-model", TINY_MODEL, "--clip-weights", clip, "--resamples", "4"]
    document = measure(capsys, models["fill"], data, *arguments)
    samples = document["figures"]["samples"]
    assert samples["clip_score"]["value"] == samples["clip_score"]["real"], "the samples are the real images"
    assert samples["clip_score"]["num_images"] == 8
    record = next(record for record in document["records"] if record["figure"] == "samples.recall")
    assert (record["n"], record["n_reference"], record["weights"]) == (8, 38, "raw")
    assert record["reference"] == document["protocol"]["samples"]["reference"]["pixels_digest"]
    assert record["reference"] != document["protocol"]["data"]["pixels_digest"]
    assert (record["sampler"], record["guidance_scale"]) == ("ddim", 2.0)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("classes", ["--clip-weights", "x.pt"], "has no captions for its samples"),
        ("text", ["--num-reference", "5"], "--num-reference without --reference"),
        ("text", ["--reference-split", "train"], "--reference-split without --reference"),
    ],
)
def test_options_of_a_reference_go_together(
    models: dict[str, Path],
    data: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    expected: str,
) -> None:
    assert main(command(models[name], data, *arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert expected in line
