"""What `ldm-scale sample` writes: pictures that say how they were made, strips, and nothing half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm_scale
from ldm_scale import load_diffusion
from ldm_scale.__main__ import main
from tests.helpers.disks import full_disk
from tests.helpers.models import SIDE
from tests.helpers.sampling import make_models, refusal, sampled, write_inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"), "text", "fill", "classes")


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["text"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("files"))


def _settings(line: str) -> dict[str, str]:
    """`Name: value, Name: value` taken apart, values quoted as JSON included."""
    found, rest = {}, line
    while rest:
        name, _, rest = rest.partition(": ")
        if rest.startswith('"'):
            found[name], end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].removeprefix(", ")
        else:
            found[name], _, rest = rest.partition(", ")
    return found


def test_every_picture_says_how_it_was_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = Path(shutil.copytree(model, tmp_path / "model, v2: mine"))
    prompts = ["a red, round apple", "cr\u00e8me br\u00fbl\u00e9e \u2603"]
    arguments = [part for prompt in prompts for part in ("--prompt", prompt)]
    arguments += ["--seed", "7", "--steps", "2", "--eta", "0.5", "--guidance", "1.5", "--negative-prompt", "blue"]
    capsys.readouterr()
    sampled(named, tmp_path, *arguments, "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["model_hash"] == load_diffusion(model).content_hash
    for i, image in enumerate(document["images"]):
        texts = Image.open(image["path"]).text  # type: ignore[attr-defined]
        assert texts["prompt"] == prompts[i]
        assert (texts["negative_prompt"], texts["seed"], texts["sampler"]) == ("blue", str(7 + i), "ddim")
        assert (texts["steps"], texts["eta"], texts["guidance"]) == ("2", "0.5", "1.5")
        assert texts["model_hash"] == document["model_hash"]
        assert texts["Software"] == f"ldm-scale {ldm_scale.__version__}"
        assert not {"strength", "weights", "guidance_interval"} & texts.keys(), "nobody gave them"
        prompt, negative, line = texts["parameters"].split("\n")
        assert (prompt, negative) == (prompts[i], "Negative prompt: blue")
        assert _settings(line) == {
            "Steps": "2",
            "Sampler": "ddim",
            "CFG scale": "1.5",
            "Seed": str(7 + i),
            "Size": f"{SIDE}x{SIDE}",
            "Model hash": document["model_hash"][:10],
            "Model": "model, v2: mine",
            "Eta": "0.5",
            "Version": f"ldm-scale {ldm_scale.__version__}",
        }
    texts = Image.open(document["grid"]).text  # type: ignore[attr-defined]
    assert (texts["seed"], texts["prompt"]) == ("7 to 8", "; ".join(prompts))


@pytest.mark.parametrize("batch", ["1", "16"])
def test_a_strip_shows_the_way_to_the_first_images(
    model: Path, tmp_path: Path, batch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    arguments = ["--prompt", "red", "--num-images", "5", "--steps", "12", "--batch", batch, "--json"]
    images = sampled(model, tmp_path, *arguments, "--strip", str(tmp_path / "strip.png"))
    assert json.loads(capsys.readouterr().out)["strip"] == str(tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.text["seed"] == "0 to 3"  # type: ignore[attr-defined]
        strip = np.asarray(picture).astype(int)
    side, margin = 96, 12
    assert strip.shape[1] == 9 * (side + margin) + margin
    step = (strip.shape[0] - margin) // 4

    def tile(row: int, column: int) -> np.ndarray:
        top, left = margin + row * step, margin + column * (side + margin)
        return strip[top : top + side : side // SIDE, left : left + side : side // SIDE]

    for row in range(4):
        assert np.array_equal(tile(row, 8), images[row]), "the image itself stands at the end"
        near = [np.abs(tile(row, column) - images[row]).mean() for column in range(8)]
        assert near[-1] < near[0], "predictions come nearer to it"
        assert near[0] > 0.1


def test_a_strip_of_fewer_steps_than_columns_and_of_tall_images(model: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "red", "--steps", "2", "--size", "32x16", "--tile", "16"]
    sampled(model, tmp_path, *arguments, "--strip", str(tmp_path / "strip.png"))
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.width == 3 * (96 + 12) + 12


def test_pictures_say_all_that_they_were_made_of(
    models: dict[str, Path], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a\nNegative prompt: b\nSteps: 9, Seed: 1"
    odd = Path(shutil.copytree(models["fill"], tmp_path / "\udce9 model"))
    arguments = ["--prompt", prompt, "--image", files["picture.png"], "--mask", files["mask.png"], "--tile", "16"]
    sampled(odd, tmp_path, *arguments, "--steps", "1", "--imagenet-guidance", "1", "--guide-scale", "0.5")
    (image,) = (tmp_path / "images").iterdir()
    for path in (image, tmp_path / "grid.png"):
        texts = Image.open(path).text  # type: ignore[attr-defined]
        assert texts["prompt"] == prompt
        assert (texts["image"], texts["mask"], texts["tile"]) == ("picture.png", "mask.png", "16")
        assert (texts["imagenet_guidance"], texts["guide_scale"]) == ("1", "0.5")
        assert texts["model"] == r"\udce9 model"
        first, settings = texts["parameters"].split("\n")
        assert first == "a Negative prompt: b Steps: 9, Seed: 1", "a prompt stays a prompt"
        assert _settings(settings)["Steps"] == "1"
    classes = ["--class", "0", "--class", "green", "--num-images", "3", "--steps", "1"]
    sampled(models["classes"], tmp_path / "classes", *classes)
    told = [Image.open(path).text["class"] for path in sorted((tmp_path / "classes" / "images").iterdir())]  # type: ignore[attr-defined]
    assert told == ["0", "green", "0"]
    assert Image.open(tmp_path / "classes" / "grid.png").text["class"] == "0; green"  # type: ignore[attr-defined]


def test_places_are_tried_before_the_model_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no model at all, which would be the next thing to be said."""
    (tmp_path / "file").touch()
    for arguments, expected in (
        (["--images-dir", str(tmp_path / "file")], f"--images-dir {tmp_path / 'file'}: nothing can be written there"),
        (["--strip", str(tmp_path / "file" / "s.png")], "s.png: nothing can be written there"),
        (["--strip", str(tmp_path / "s.jpg")], "s.jpg: the picture is a PNG; give a name that ends in .png"),
        (["--seed", "-7"], "--seed -7: must be from 0"),
        (["--prompt", "caf\udce9"], r"--prompt 'caf\udce9': holds bytes that are not UTF-8"),
        (["--negative-prompt", "\udce9"], r"--negative-prompt '\udce9': holds bytes"),
    ):
        assert expected in refusal(capsys, tmp_path / "none", tmp_path, *arguments)
    assert main(["sample", str(tmp_path / "none"), "--out", "/proc/a/b.png"]) == 2
    assert "--out /proc/a/b.png: nothing can be written there" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pictures_are_whole_or_not_there(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    line = refusal(capsys, model, tmp_path, "--prompt", "x", "--strip", str(tmp_path / "folder"))
    assert "--strip" in line
    assert "is a folder; give the name of a picture" in line
    command = [
        "sample",
        str(model),
        "--device",
        "cpu",
        "--prompt",
        "x",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "g.png"),
    ]
    with full_disk():
        assert main([*command, "--images-dir", str(tmp_path / "images")]) == 1
    assert "g.png" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
