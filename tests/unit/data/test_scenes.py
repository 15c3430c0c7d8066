from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ldm_scale.data.shards import open_manifest
from ldm_scale.data.sources import Sample, openmoji_scenes
from ldm_scale.data.sources.openmoji import render, select
from ldm_scale.data.sources.openmoji_scenes import SceneRequest, make_scene, prepare_openmoji_scenes
from ldm_scale.data.sources.scenes import Background, cell_pixels, noun_phrase, plan_scene
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.prepare import main

EMOJI = select("demo")[0]
KEYS, NAMES = tuple(item.key for item in EMOJI), tuple(item.caption for item in EMOJI)


def request(resolution: int = 64, seed: int = 0, max_objects: int = 4, backgrounds: str = "all") -> SceneRequest:
    return SceneRequest(KEYS, NAMES, resolution, seed, max_objects, backgrounds)


def opened(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, Any], str]:
    """(picture, map, metadata, caption)."""
    picture, labels = (np.asarray(Image.open(io.BytesIO(sample.members[name]))) for name in ("png", "seg.png"))
    return picture, labels, json.loads(sample.members["json"]), sample.members["txt"].decode()


def test_boxes_are_tight_around_the_pixels_that_the_map_gives_to_each_object() -> None:
    counts = set()
    for number in range(60):
        picture, labels, metadata, _ = opened(make_scene(number, request()))
        assert picture.shape == (64, 64, 3)
        assert labels.shape == (64, 64)
        assert labels.dtype == np.uint8
        counts.add(len(metadata["objects"]))
        named = {1 + NAMES.index(item["class"]) for item in metadata["objects"]}
        assert len(named) == len(metadata["objects"])  # every class once
        assert set(np.unique(labels).tolist()) == {0, *named}
        for item in metadata["objects"]:
            rows, columns = np.nonzero(labels == 1 + NAMES.index(item["class"]))
            x, y, width, height = item["box"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
    assert counts == {1, 2, 3, 4}


def test_an_object_is_its_emoji_on_the_background() -> None:
    lone = next(n for n in range(100) if len(opened(make_scene(n, request(96)))[2]["objects"]) == 1)
    picture, labels, metadata, _ = opened(make_scene(lone, request(96)))
    (item,) = metadata["objects"]
    scene = openmoji_scenes.plan_scene(0, lone, NAMES, 4, lambda label, side: _mask(label, side))
    assert np.array_equal(picture[labels == 0][0], scene.background.draw(96)[labels == 0][0])
    side = cell_pixels(scene.objects[0].cell, 96)
    drawn = np.asarray(Image.open(io.BytesIO(render(KEYS[NAMES.index(item["class"])], side)))).astype(int)
    mask = _mask(NAMES.index(item["class"]), side, cut=False)
    rows, columns = np.nonzero(mask)
    x, y, width, height = item["box"]
    cell = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    found = picture[y : y + height, x : x + width].astype(int)
    inner = labels[y : y + height, x : x + width] > 0
    # Rendered on white, so equal wherever it is opaque: all but its rim.
    assert (np.abs(found - cell).max(axis=-1)[inner] <= 1).mean() > 0.8


def _mask(label: int, side: int, cut: bool = True) -> NDArray[np.bool_]:
    """The emoji's mask by this test's own means: where it hides more than half of black against white."""
    black, white = (
        np.asarray(openmoji_scenes.render_transparent(KEYS[label], side, colour).convert("RGB")).astype(int)
        for colour in ("#000000", "#ffffff")
    )
    mask: NDArray[np.bool_] = (white - black).max(axis=-1) < 128
    if not cut:
        return mask
    rows, columns = np.nonzero(mask)
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


@pytest.mark.parametrize("resolution", [32, 48, 128])
def test_a_scene_is_the_same_at_any_resolution(resolution: int) -> None:
    coarse = min(64, resolution)
    equal, apart = [], []
    for number in range(60):
        _, here, small, caption = opened(make_scene(number, request(64)))
        _, there, large, other = opened(make_scene(number, request(resolution)))
        assert caption == other
        assert [item["class"] for item in small["objects"]] == [item["class"] for item in large["objects"]]
        maps = [np.asarray(Image.fromarray(labels).resize((coarse, coarse), 0)) for labels in (here, there)]
        equal.append((maps[0] == maps[1]).mean())
        for a, b in zip(small["objects"], large["objects"], strict=True):
            apart.append(np.abs(np.array(a["box"]) / 64 - np.array(b["box"]) / resolution).max() * coarse)
    # Rims differ, and stalks that are thinner than a pixel.
    assert np.mean(equal) > 0.95
    assert min(equal) > 0.85
    assert np.mean(np.array(apart) <= 1.5) > 0.9


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_half_of_each_object_can_be_seen(resolution: int) -> None:
    shares = []
    for number in range(150):
        _, labels, metadata, _ = opened(make_scene(number, request(resolution)))
        for item in metadata["objects"]:
            label = NAMES.index(item["class"])
            scene = plan_scene(0, number, NAMES, 4, lambda label, side: openmoji_scenes._sprite(KEYS[label], side).mask)
            side = cell_pixels(next(o.cell for o in scene.objects if o.label == label), resolution)
            shares.append((labels == label + 1).sum() / openmoji_scenes._sprite(KEYS[label], side).mask.sum())
    assert 0.5 <= min(shares) < 0.75
    assert max(shares) == 1.0


def test_scenes_follow_seed_and_number_alone() -> None:
    first, again = (make_scene(5, request(32)).members for _ in range(2))
    assert first == again
    assert (
        make_scene(6, request(32)).members["png"] != first["png"] != make_scene(5, request(32, seed=1)).members["png"]
    )


def test_captions_are_true() -> None:
    """Positions that captions state are those of the boxes; colours and nouns are there."""
    pairs = 0
    for number in range(200):
        _, _, metadata, caption = opened(make_scene(number, request()))
        objects = metadata["objects"]
        nouns = [noun_phrase(item["class"]) for item in objects]
        assert all(noun in caption for noun in nouns)
        assert all(colour in caption for colour in metadata["background"]["colours"])
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]", caption), caption
        if len(objects) < 2 or any(word in caption for word in (" with ", "showing")):
            continue
        first, second = (np.array(item["box"][:2]) + np.array(item["box"][2:]) / 2 for item in objects[:2])
        across, down = second - first
        (relation,) = re.findall(
            f"{noun_phrase(objects[0]['class'])} (.*?) {noun_phrase(objects[1]['class'])}", caption
        )
        if abs(abs(across) - abs(down)) > 16:  # boxes are of what can be seen, captions of whole objects
            wanted = ("left of" if across > 0 else "right of") if abs(across) > abs(down) else None
            assert relation == (wanted or ("above" if down > 0 else "below"))
            pairs += 1
    assert pairs > 30


def test_captions_word_for_word() -> None:
    wanted = {
        "cherries": "cherries",
        "cactus": "a cactus",
        "eggplant": "an eggplant",
        "unicorn": "a unicorn",
        "hourglass": "an hourglass",
        "smiling face with horns": "a smiling face with horns",
        "locked": "a padlock",
    }
    assert {name: noun_phrase(name) for name in wanted} == wanted
    captions = [opened(make_scene(number, request(max_objects=3)))[3] for number in (0, 2, 18)]
    assert captions == [
        "a cat face above a robot on a red background with pink dots",
        "a globe showing Europe-Africa at the bottom right on a background of blue and grey checks",
        "a padlock left of a robot and grapes at the right on a background of blue and red checks",
    ]


@pytest.mark.parametrize(
    ("pattern", "axis", "rows", "columns"),
    [("flat", 0, 1, 1), ("stripes", 0, 2, 1), ("stripes", 1, 1, 2), ("checks", 0, 2, 2), ("fade", 0, 64, 1)],
)
def test_backgrounds(pattern: Any, axis: int, rows: int, columns: int) -> None:
    background = Background(pattern, ("black", "white"), ((0, 0, 0), (255, 255, 255)), axis, 0.25)
    picture = background.draw(64)
    assert len(np.unique(picture[:, 0], axis=0)) == rows
    assert len(np.unique(picture[0], axis=0)) == columns


def test_white_backgrounds_change_nothing_else() -> None:
    for number in range(8):
        plain, white = (opened(make_scene(number, request(max_objects=3, backgrounds=b))) for b in ("plain", "white"))
        assert plain[3].rpartition(" on ")[0] == white[3].rpartition(" on ")[0]
        assert white[3].endswith(" on a white background")
        assert (white[1] == plain[1]).all()
        assert (white[0][white[1] == 0] == 255).mean() > 0.8  # all but the objects' rims


def test_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "openmoji-scenes",
        "--subset",
        "demo",
        "--resolution",
        "32",
        "--num-samples",
        "40",
        "--heldout-percent",
        "20",
        "--json",
    ]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["status"] == "written"
    assert sum(written["splits"].values()) == 40
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["object_classes"] == list(NAMES)
    assert manifest["map_labels"] == ["background", *NAMES]
    assert manifest["license"] == "CC BY-SA 4.0"
    assert "OpenMoji" in manifest["attribution"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "reused"
    # More scenes leave the first ones as they are, and on their side of the split.
    longer = prepare_openmoji_scenes(tmp_path / "b", 32, 60, 0, "demo", 3, 20.0, 256)
    for split, count in written["splits"].items():
        few, many = (open_manifest(tmp_path / name, split) for name in ("a", "b"))
        assert longer.manifest["splits"][split]["num_samples"] > count
        for number in range(count):
            assert few.read(number) == many.read(number)
    numbers = [{open_manifest(tmp_path / "a", split).key(0)[-8:]} for split in written["splits"]]
    assert not set.intersection(*numbers)


def test_other_requests_are_refused(tmp_path: Path) -> None:
    prepare_openmoji_scenes(tmp_path / "a", 16, 4, 0, "demo", 3, 0.0, 256)
    with pytest.raises(DataError, match=r"prepared by another request.*seed=0.*seed=1"):
        prepare_openmoji_scenes(tmp_path / "a", 16, 4, 1, "demo", 3, 0.0, 256)
    with pytest.raises(ConfigError, match=r"--resolution 15: scenes need at least 16"):
        prepare_openmoji_scenes(tmp_path / "b", 15, 4, 0, "demo", 3, 0.0, 256)
    with pytest.raises(DataError, match=r"--subset no-skin-tones: \d+ emoji, and a map of 8 bits tells 254"):
        prepare_openmoji_scenes(tmp_path / "b", 16, 4, 0, "no-skin-tones", 3, 0.0, 256)
