from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader, open_manifest
from ldm_scale.data.shards import Dataset
from ldm_scale.data.sources.coco_files import CocoImage, Instance, draw_map, read_captions_file, read_instances
from ldm_scale.errors import DataError
from ldm_scale.prepare import main

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "kite"}]
SIZE = (60, 40)  # of every picture; the centred square is x from 10 to 50

# id, image, category, box, outline, crowd
ANNOTATIONS: list[tuple[int, int, int, list[float], Any, int]] = [
    (1, 11, 3, [20, 10, 10, 20], [[20, 10, 30, 10, 30, 30, 20, 30]], 0),
    (2, 11, 7, [0, 0, 15, 40], [[0, 0, 15, 0, 15, 40, 0, 40]], 0),
    (3, 11, 7, [0, 0, 60, 40], {"size": [40, 60], "counts": [0, 200, 2200]}, 1),
    (4, 12, 90, [0, 0, 5, 5], [[0, 0, 5, 0, 5, 5, 0, 5]], 0),  # outside the square
    (5, 12, 3, [30.5, 20, 0, 4], [[30, 20, 30, 24, 30, 22]], 0),  # no area
    (6, 13, 90, [10, 0, 40, 40], [[10, 0, 50, 0, 50, 40, 10, 40]], 0),
    (7, 13, 3, [20, 10, 10, 10], [[20, 10, 30, 10, 30, 20, 20, 20]], 0),
]


def content() -> dict[str, Any]:
    return {
        "images": [
            {"id": n, "file_name": f"{n:012d}.jpg", "width": SIZE[0], "height": SIZE[1]} for n in (13, 11, 12, 14)
        ],
        "categories": list(CATEGORIES),
        "annotations": [
            {"id": i, "image_id": n, "category_id": c, "bbox": box, "segmentation": outline, "iscrowd": crowd}
            for i, n, c, box, outline, crowd in ANNOTATIONS
        ],
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in (11, 12, 13):
        image = Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
        image.save(tmp_path / "images" / f"{number:012d}.jpg", quality=95)
    (tmp_path / "instances.json").write_text(json.dumps(content()))
    captions = [(5, 11, "second"), (2, 11, " first\n"), (9, 11, "third"), (3, 13, "only"), (4, 12, "")]
    entries = [{"id": i, "image_id": n, "caption": text} for i, n, text in captions]
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": entries}))
    return tmp_path


def arguments(coco: Path, *more: str, split: str = "train", out: str = "out") -> list[str]:
    return [
        "coco",
        *("--images", str(coco / "images"), "--instances", str(coco / "instances.json")),
        *("--resolution", "20", "--split", split, "--out", str(coco / out), *more),
    ]


def metadata_of(dataset: Dataset) -> dict[int, dict[str, Any]]:
    """The .json of every sample by the image's number."""
    found = [json.loads(dataset.read(n)["json"]) for n in range(dataset.num_samples)]
    return {entry["id"]: entry for entry in found}


def test_boxes_follow_the_square_and_crowds_are_no_objects(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(coco, "--captions", str(coco / "captions.json"), "--json")
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["splits"] == {"train": 3}
    assert result["left_out"] == {
        "file cannot be read (No such file or directory)": 1,
        "crowds among the annotations": 1,
        "annotations whose box has no area": 1,
    }
    dataset = open_manifest(coco / "out", "train")
    assert dataset.object_classes == ("cat", "dog", "kite")  # by their numbers
    assert dataset.map_labels == ()
    found = metadata_of(dataset)
    assert {n: entry["objects"] for n, entry in found.items()} == {
        11: [{"class": 0, "box": [5, 5, 5, 10]}, {"class": 1, "box": [0, 0, 2.5, 20]}],
        12: [],
        13: [{"class": 2, "box": [0, 0, 20, 20]}, {"class": 0, "box": [5, 5, 5, 5]}],
    }
    assert {n: entry["captions"] for n, entry in found.items()} == {
        11: ["first", "second", "third"],
        12: [],
        13: ["only"],
    }
    stored = np.asarray(Image.open(io.BytesIO(dataset.read(0)["png"])))  # type: ignore[arg-type]
    whole = Image.open(coco / "images" / f"{min(found):012d}.jpg")
    wanted = np.asarray(whole.crop((10, 0, 50, 40)).resize((20, 20), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(stored - wanted).max() <= 1
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "reused"


def test_a_second_split_joins_the_first(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(coco)) == 0
    assert main([*arguments(coco, split="heldout"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["splits"] == {"heldout": 3, "train": 3}
    assert result["left_out"]["crowds among the annotations"] == 2
    keys = {open_manifest(coco / "out", split).key(0) for split in ("train", "heldout")}
    assert len(keys) == 2
    with pytest.raises(DataError, match=r"prepared by another request.*min_objects=0.*min_objects=1"):
        main(arguments(coco, "--min-objects", "1"))
    changed = content()
    changed["categories"].append({"id": 1, "name": "cow"})
    (coco / "instances.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=r"its split heldout and third differ in object_classes; choose another --out"):
        main(arguments(coco, split="third"))
    assert not (coco / "out" / "third").exists()


def test_images_of_few_objects_may_be_left_out(coco: Path) -> None:
    assert main(arguments(coco, "--min-objects", "2")) == 0
    assert set(metadata_of(open_manifest(coco / "out", "train"))) == {11, 13}


def test_maps_are_drawn_from_the_outlines(coco: Path) -> None:
    instances = read_instances(coco / "instances.json", with_outlines=True)
    whole = np.asarray(draw_map(next(image for image in instances.images if image.number == 11)))
    wanted = np.zeros((40, 60), int)
    wanted[:, :5] = 255  # the crowd: 200 pixels, column by column
    wanted[0:40, 0:15] = 2
    wanted[10:30, 20:30] = 1
    assert np.array_equal(whole, wanted)
    assert main(arguments(coco, "--instance-maps")) == 0
    dataset = open_manifest(coco / "out", "train")
    assert dataset.map_labels == ("background", "cat", "dog", "kite")
    samples = {json.loads(raw["json"])["id"]: raw for raw in map(dataset.read, range(3))}
    shown = np.asarray(Image.open(io.BytesIO(samples[13]["seg.png"])))  # type: ignore[arg-type]
    assert shown.shape == (20, 20)
    assert (shown[5:10, 5:10] == 1).all()  # the smaller on top of the larger
    assert (shown == 3).sum() > 300


def test_a_picture_of_another_size_than_stated_is_left_out(coco: Path) -> None:
    Image.new("RGB", SIZE[::-1]).save(coco / "images" / "000000000013.jpg")
    assert main(arguments(coco)) == 0
    assert set(metadata_of(open_manifest(coco / "out", "train"))) == {11, 12}
    assert _left_out(coco)["picture has another size than its annotations state"] == 1


def test_outlines_cover_the_pixels_whose_centres_they_surround() -> None:
    rng = np.random.default_rng(0)
    shared = []
    for _ in range(20):
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 8)), rng.uniform(8, 18, 8)
        polygon = np.stack([30 + radii * np.cos(angles), 20 + radii * np.sin(angles)], axis=1)
        instance = Instance(0, (0.0, 0.0, 60.0, 40.0), False, [polygon.reshape(-1).astype(np.float32)])
        drawn = np.asarray(draw_map(CocoImage(1, "x.jpg", SIZE, (instance,)))) == 1
        wanted = _surrounded(polygon)
        shared.append((drawn & wanted).sum() / (drawn | wanted).sum())
    assert np.mean(shared) > 0.96


def _surrounded(polygon: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The pixels whose centre has an odd number of edges to its right."""
    across, down = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
    inside = np.zeros(across.shape, np.bool_)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, 1, axis=0), strict=True):
        inside ^= ((y1 > down) != (y2 > down)) & (across < x1 + (x2 - x1) * (down - y1) / (y2 - y1))
    return inside


def test_a_crowd_in_compressed_run_lengths_leaves_its_image_out(coco: Path) -> None:
    changed = content()
    changed["annotations"][2]["segmentation"]["counts"] = "abc"
    changed["annotations"][5]["segmentation"] = [[1, 2, 3, 4]]
    (coco / "instances.json").write_text(json.dumps(changed))
    assert main(arguments(coco, "--instance-maps")) == 0
    manifest = json.loads((coco / "out" / "manifest.json").read_text())
    assert manifest["left_out_names"][:1] == [
        "000000000011.jpg: run lengths of an outline are compressed or malformed; decode them with pycocotools first"
    ]
    assert "000000000013.jpg: an outline is no polygon of at least 3 points" in manifest["left_out_names"]


def test_maps_of_coco_stuff(coco: Path) -> None:
    (coco / "stuff").mkdir()
    for number, value in ((11, 0), (12, 255), (13, 4)):
        Image.new("L", SIZE, value).save(coco / "stuff" / f"{number:012d}.png")
    (coco / "labels.txt").write_text("person\nbicycle\n\ncar\nwood\n")
    options = ("--stuff", str(coco / "stuff"), "--map-labels", str(coco / "labels.txt"))
    assert main(arguments(coco, *options)) == 0
    dataset = open_manifest(coco / "out", "train")
    assert dataset.map_labels == ("person", "bicycle", "car", "wood")
    assert set(metadata_of(dataset)) == {11, 12}
    assert any("neither in the manifest's map_labels" in reason for reason in _left_out(coco))
    with pytest.raises(DataError, match="--stuff and --map-labels go together"):
        main(arguments(coco, *options[:2], out="other"))


def _left_out(coco: Path) -> dict[str, int]:
    return json.loads((coco / "out" / "manifest.json").read_text())["left_out"]  # type: ignore[no-any-return]


def test_which_caption_is_shown_is_a_function_of_seed_epoch_and_key(coco: Path) -> None:
    assert main(arguments(coco, "--captions", str(coco / "captions.json"))) == 0
    data = DataConfig(manifest=str(coco / "out"), resolution=8, num_workers=0)

    def shown(augment: bool, seed: int = 0, world_size: int = 1) -> list[tuple[int, str, str]]:
        found = []
        for rank in range(world_size):
            settings: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size, "augment": augment}
            batch = 2 // world_size
            for item in build_loader(data, global_batch=2, micro_batch=batch, num_epochs=40, **settings):
                found += zip(item.image_numbers.tolist(), item.keys, item.captions, strict=True)
        return sorted(found)

    captions = shown(augment=True)
    key = next(key for _, key, caption in captions if caption == "first")
    counts = [sum(caption == text for _, k, caption in captions if k == key) for text in ("first", "second", "third")]
    assert sum(counts) == 40
    assert min(counts) >= 5  # 13.3 of 40 expected, standard deviation 3
    assert captions == shown(augment=True, world_size=2)
    assert captions != shown(augment=True, seed=1)
    assert {caption for _, _, caption in shown(augment=False)} == {"first", "only", ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), 'must be a JSON object with a list "images"'),
        (lambda c: c.pop("annotations"), 'must be a JSON object with a list "annotations"'),
        (lambda c: c.pop("categories"), 'no list "categories"; --instances takes'),
        (lambda c: c.update(images=[]), "annotations entry 1 is malformed .of image 11, which the file does not list"),
        (lambda c: c.update(categories=[]), "0 categories"),
        (lambda c: c["categories"].append({"id": 8, "name": "cat"}), "4 categories, 3 names; each needs its own"),
        (lambda c: c["categories"].append({"id": 8}), "categories entry 8 is malformed .no 'name'"),
        (lambda c: c["images"][0].pop("file_name"), "images entry 13 is malformed .no 'file_name'"),
        (lambda c: c["images"][0].update(file_name="../x.jpg"), "points outside the folder"),
        (lambda c: c["images"].append(3), "images entry 3 is malformed"),
        (lambda c: c["annotations"][1].pop("bbox"), "annotations entry 2 is malformed .no 'bbox'"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "annotations entry 2 is malformed"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]),
            "entry 2 is malformed .bbox is not finite",
        ),
        (lambda c: c["annotations"][1].update(category_id=5), "of category 5, which the file does not list"),
        (lambda c: c["annotations"][1].update(image_id=99), "of image 99, which the file does not list"),
    ],
)
def test_malformed_instances_say_where(coco: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    changed = json.loads(json.dumps(content()))
    change(changed)
    (coco / "instances.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=message) as caught:
        main(arguments(coco))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(coco / "instances.json"))
    assert not (coco / "out" / "train").exists()


def test_files_that_are_missing_or_not_json(coco: Path) -> None:
    (coco / "captions.json").write_text("{")
    with pytest.raises(DataError, match=r"captions.json: not JSON .*; download it again"):
        read_captions_file(coco / "captions.json")
    with pytest.raises(DataError, match=r"none.json: cannot be read \(No such file"):
        main([*arguments(coco), "--captions", str(coco / "none.json")])
    with pytest.raises(DataError, match=r"--images .*/none: no such folder"):
        main([*arguments(coco), "--images", str(coco / "none")])
    for image in (coco / "images").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"none of 4 images can be used; 000000000011.jpg: file cannot be read"):
        main(arguments(coco))
    (coco / "other").mkdir()
    (coco / "other" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="not a data set of `ldm-scale prepare coco`"):
        main(arguments(coco, out="other"))
