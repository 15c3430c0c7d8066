from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Batch, build_loader, open_manifest
from ldm_scale.data.annotations import (
    LAYOUT,
    MAP,
    MIN_OBJECT_AREA,
    View,
    Vocabulary,
    check_labels,
    layout_of,
    read_map,
    read_objects,
    shown_objects,
)
from ldm_scale.data.decode import DecodeSettings, decode_sample
from ldm_scale.data.policy import BadSample
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.errors import ConfigError, DataError
from tests.helpers.annotated import NUMBERS, PALETTE, check_boxes, scene
from tests.helpers.latents import encode, rewrite
from tests.helpers.pictures import save
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import png, write_tar

BOTH = frozenset({LAYOUT, MAP})
SIZE = (30, 20)
PLAIN = View(SIZE, (5.0, 0.0, 25.0, 20.0), mirror=False)  # the centred square


def test_boxes_and_crop_are_of_the_whole_picture_and_mirrored_with_it() -> None:
    """By hand, and against the mirrored picture itself."""
    objects = read_objects({"objects": [{"class": "dog", "box": [10, 5, 5, 10]}]}, NUMBERS)
    assert objects == [(1, (10.0, 5.0, 15.0, 15.0))]
    inner = View(SIZE, (12.0, 8.0, 16.0, 12.0), mirror=False)
    expected = {
        PLAIN: ((1 / 3, 0.25, 0.5, 0.75), (1 / 6, 0.0, 5 / 6, 1.0), (0.25, 0.25, 0.5, 0.75)),
        replace(PLAIN, mirror=True): ((0.5, 0.25, 2 / 3, 0.75), (1 / 6, 0.0, 5 / 6, 1.0), (0.5, 0.25, 0.75, 0.75)),
        inner: ((1 / 3, 0.25, 0.5, 0.75), (0.4, 0.4, 16 / 30, 0.6), (0.0, 0.0, 0.75, 1.0)),
        replace(inner, mirror=True): ((0.5, 0.25, 2 / 3, 0.75), (14 / 30, 0.4, 0.6, 0.6), (0.25, 0.0, 1.0, 1.0)),
    }
    for view, (box, crop, shown) in expected.items():
        layout = layout_of(objects, view)
        (of_picture,), (of_square,) = layout.objects, shown_objects(layout)
        assert (of_picture.label, of_square.label) == (1, 1)
        assert of_picture.box == pytest.approx(box)
        assert layout.crop == pytest.approx(crop)
        assert of_square.box == pytest.approx(shown)
    turned = layout_of([(1, (15.0, 5.0, 20.0, 15.0))], View(SIZE, (14.0, 8.0, 18.0, 12.0), mirror=False))
    mirrored = layout_of(objects, replace(inner, mirror=True))
    assert turned.objects[0].box == pytest.approx(mirrored.objects[0].box)
    assert turned.crop == pytest.approx(mirrored.crop)


@pytest.mark.parametrize(
    ("box", "known", "shown"),
    [
        ([-10, -10, 20, 15], (0.0, 0.0, 1 / 3, 0.25), (0.0, 0.0, 0.25, 0.25)),  # clipped at the picture
        ([0, 0, 100, 100], (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)),
        ([24, 19, 50, 50], (0.8, 0.95, 1.0, 1.0), (0.95, 0.95, 1.0, 1.0)),
        ([40, 0, 5, 5], None, None),  # outside the picture
        ([0, 0, 5, 20], None, None),  # in the picture, outside the square: touches its edge
        ([25, 0, 5, 20], None, None),
        ([10, 10, 0.3, 0.19], None, None),  # just below the least area, 1e-4 of 600 pixels
        ([10, 10, 0.3, 0.21], (1 / 3, 0.5, 10.3 / 30, 0.5105), (0.25, 0.5, 0.265, 0.5105)),
        ([24.9, 0, 3, 0.3], (0.83, 0.0, 0.93, 0.015), None),  # hardly anything of it is shown
    ],
)
def test_what_does_not_reach_into_the_square_is_left_out(
    box: list[float], known: tuple[float, ...] | None, shown: tuple[float, ...] | None
) -> None:
    layout = layout_of(read_objects({"objects": [{"class": 0, "box": box}]}, NUMBERS), PLAIN)
    assert MIN_OBJECT_AREA == 1e-4
    for found, expected in ((layout.objects, known), (shown_objects(layout), shown)):
        assert len(found) == (expected is not None)
        if expected is not None:
            assert found[0].box == pytest.approx(expected)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, 'no "objects"'),
        ({"objects": {}}, '"objects" is not a list'),
        ({"objects": [3]}, '"objects" is not a list'),
        ({"objects": [{"box": [0, 0, 1, 1]}]}, "class is not in the manifest's object_classes"),
        ({"objects": [{"class": "cow", "box": [0, 0, 1, 1]}]}, "class is not in the manifest's object_classes"),
        ({"objects": [{"class": 2, "box": [0, 0, 1, 1]}]}, "class is not in the manifest's object_classes"),
        ({"objects": [{"class": -1, "box": [0, 0, 1, 1]}]}, "class is not in the manifest's object_classes"),
        ({"objects": [{"class": True, "box": [0, 0, 1, 1]}]}, "class is not in the manifest's object_classes"),
        ({"objects": [{"class": 0}]}, "not .x, y, width, height. in finite numbers"),
        ({"objects": [{"class": 0, "box": [0, 0, 1]}]}, "not .x, y, width, height. in finite numbers"),
        ({"objects": [{"class": 0, "box": [0, 0, 1, "1"]}]}, "not .x, y, width, height. in finite numbers"),
        ({"objects": [{"class": 0, "box": [float("nan"), 0, 1, 1]}]}, "not .x, y, width, height. in finite numbers"),
        ({"objects": [{"class": 0, "box": [0, 0, float("inf"), 1]}]}, "not .x, y, width, height. in finite numbers"),
        ({"objects": [{"class": 0, "box": [5, 5, 0, 3]}]}, "no area: width and height must be above 0"),
        ({"objects": [{"class": 0, "box": [5, 5, 3, -3]}]}, "no area: width and height must be above 0"),
    ],
)
def test_malformed_objects_say_why(metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        read_objects(metadata, NUMBERS)


def test_an_image_without_objects_has_an_empty_layout() -> None:
    assert layout_of(read_objects({"objects": []}, NUMBERS), PLAIN).objects == ()


MAP_PIXELS = np.arange(600, dtype=np.uint8).reshape(20, 30) % 3


def test_maps_follow_the_crop_and_the_mirror() -> None:
    data = png(Image.fromarray(MAP_PIXELS))
    assert np.array_equal(read_map(data, 3, PLAIN, (20, 20)), MAP_PIXELS[:, 5:25])
    assert np.array_equal(read_map(data, 3, replace(PLAIN, mirror=True), (20, 20)), MAP_PIXELS[:, 5:25][:, ::-1])
    assert np.array_equal(read_map(data, 3, PLAIN, (40, 40)), MAP_PIXELS[:, 5:25].repeat(2, 0).repeat(2, 1))
    box = (7.3, 1.9, 20.1, 14.7)
    centres = (np.arange(9) + 0.5) * (box[2] - box[0]) / 9
    wanted = MAP_PIXELS[np.ix_((box[1] + centres).astype(int), (box[0] + centres).astype(int))]
    assert np.array_equal(read_map(data, 3, View(SIZE, box, False), (9, 9)), wanted)


def test_the_numbers_of_a_palette_are_labels() -> None:
    image = Image.fromarray(MAP_PIXELS).convert("P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    assert np.array_equal(read_map(png(image), 3, PLAIN, (20, 20)), MAP_PIXELS[:, 5:25])


def _changed(value: int) -> bytes:
    pixels = MAP_PIXELS.copy()
    pixels[3, 8] = value
    return png(Image.fromarray(pixels))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, r"no label map \(seg.png\)"),
        (b"junk", "label map does not decode"),
        (png(Image.fromarray(MAP_PIXELS))[:60], "label map does not decode"),
        (save(Image.fromarray(MAP_PIXELS), "BMP"), "label map does not decode"),
        (png(Image.new("RGB", SIZE)), "not a PNG of 8 bits and one channel"),
        (png(Image.new("I;16", SIZE)), "not a PNG of 8 bits and one channel"),
        (png(Image.new("1", SIZE)), "not a PNG of 8 bits and one channel"),
        (png(Image.new("L", (20, 30))), "another size than its picture"),
        (_changed(3), "neither in the manifest's map_labels nor 255"),
        (_changed(254), "neither in the manifest's map_labels nor 255"),
    ],
)
def test_malformed_maps_say_why(data: bytes | None, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        read_map(data, 3, PLAIN, (20, 20))


def test_unknown_pixels_stay_unknown() -> None:
    assert read_map(_changed(255), 3, PLAIN, (20, 20))[3, 3] == 255
    check_labels(np.full((2, 2), 255, np.uint8), 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes")
    (path / "data").mkdir()
    rng = np.random.default_rng(0)
    samples = [(f"s{n:02d}", scene(rng)) for n in range(16)]
    shards = [write_tar(path / "data" / f"train-{n}.tar", samples[8 * n : 8 * n + 8]) for n in range(2)]
    manifest = path / "data" / "manifest.json"
    index_tars(shards, manifest, "train", ["cat", "dog"], ["nothing", "cat", "dog"])
    tiny_artifact(path / "artifact")
    encode(path, "--flips", out="flips")
    encode(path, "--crops", "6", "--crop-scale-min", "0.5", "--flips", out="crops")
    return path


def batches(manifest: Path, annotations: frozenset[str] = BOTH, **settings: Any) -> list[Batch]:
    data = replace(
        DataConfig(manifest=str(manifest), resolution=16, crop_scale_min=0.5, horizontal_flip=True, num_workers=0),
        **settings,
    )
    loader = build_loader(
        data,
        seed=1,
        global_batch=8,
        micro_batch=8,
        rank=0,
        world_size=1,
        num_epochs=3,
        accept_latents=True,
        annotations=annotations,
    )
    return list(loader)


def test_boxes_and_maps_of_a_batch_show_what_its_pictures_show(folder: Path) -> None:
    seen, crops = 0, set()
    for batch in batches(folder / "data", resolution=64):
        assert batch.maps is not None
        assert batch.layouts is not None
        assert (batch.maps.dtype, tuple(batch.maps.shape)) == (torch.uint8, (8, 64, 64))
        for image, labels, layout in zip(batch.images, batch.maps.numpy(), batch.layouts, strict=True):
            seen += check_boxes(labels, layout)
            crops.add(layout.crop)
            pixels = ((image.permute(1, 2, 0).numpy() + 1) * 127.5)[..., None, :]
            nearest = np.abs(pixels - np.array(PALETTE)).sum(axis=-1).argmin(axis=-1)
            assert (nearest == labels).mean() > 0.97  # but for the rims, which the picture's resampling blends
    assert seen > 50
    assert len(crops) == 48


@pytest.mark.parametrize(("cache", "crops"), [("flips", 1.0), ("crops", 0.5)])
def test_latent_caches_give_the_annotations_of_their_variants(folder: Path, cache: str, crops: float) -> None:
    dataset = open_manifest(folder / cache, "train")
    assert dataset.object_classes == ("cat", "dog")
    assert dataset.map_labels == ("nothing", "cat", "dog")
    settings = DecodeSettings(16, crops, horizontal_flip=True, seed=1, annotations=BOTH)
    same = batches(folder / "data", crop_scale_min=crops)
    mirrored = 0
    for batch, images in zip(batches(folder / cache, crop_scale_min=crops), same, strict=True):
        assert batch.maps is not None
        assert batch.layouts is not None
        assert len(batch.images) == 0
        if cache == "flips":  # the very transform of training from pictures
            assert batch.layouts == images.layouts
            assert torch.equal(batch.maps, images.maps)
        for key, position, labels, layout in zip(
            batch.keys, batch.image_numbers.tolist(), batch.maps.numpy(), batch.layouts, strict=True
        ):
            check_boxes(labels, layout)
            number = next(n for n in range(16) if dataset.key(n) == key)
            raw = dataset.read(number)
            assert dataset.latents is not None
            record = json.loads(raw["latents.json"])
            variant = record["variants"][dataset.latents.variant(settings, position // 16, key)]
            left, top, right, bottom = variant["box"]
            crop = (left / 48, top / 40, right / 48, bottom / 40)
            assert layout.crop == ((1 - crop[2], crop[1], 1 - crop[0], crop[3]) if variant["flip"] else crop)
            mirrored += variant["flip"]
    assert 0 < mirrored < 48


def test_what_was_not_asked_for_is_neither_read_nor_missed(folder: Path) -> None:
    (batch, *_) = batches(folder / "data", frozenset())
    assert batch.layouts is None
    assert batch.maps is None
    (batch, *_) = batches(folder / "data", frozenset({MAP}))
    assert batch.layouts is None
    assert batch.maps is not None


def test_a_manifest_without_the_names_is_refused(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "data" / "manifest.json").read_text())
    del content["map_labels"]
    for entry in content["splits"]["train"]["shards"]:
        entry |= {name: str(folder / "data" / entry[name]) for name in ("file", "index")}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert open_manifest(tmp_path, "train").map_labels == ()
    batches(tmp_path, frozenset({LAYOUT}))
    with pytest.raises(ConfigError, match=r"lists no map_labels, which a conditioning on a map needs.*--map-labels"):
        batches(tmp_path)
    content |= {"map_labels": [str(n) for n in range(256)]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"malformed manifest .*256 map_labels, and a map tells 255 apart"):
        open_manifest(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda members: members.pop("seg.png"), "no label map (seg.png)"),
        (lambda members: members.update(json=b"{}"), 'no "objects" in its .json'),
        (lambda members: members.update(json=b'{"objects": [{"class": "cow"}]}'), "an object's class is not in"),
    ],
)
def test_bad_annotations_are_counted_and_replaced(
    tmp_path: Path, change: Callable[[dict[str, bytes]], Any], reason: str
) -> None:
    rng = np.random.default_rng(0)
    samples = [(f"s{n:02d}", scene(rng)) for n in range(8)]
    change(samples[3][1])
    write_tar(tmp_path / "a.tar", samples)
    index_tars([tmp_path / "a.tar"], tmp_path / "manifest.json", "train", ["cat", "dog"], ["nothing", "cat", "dog"])
    found = batches(tmp_path)
    assert [len(batch.keys) for batch in found] == [8, 8, 8]
    bad = [record for batch in found for record in batch.bad]
    assert {record.key for record in bad} == {"a/s03"}
    assert len(bad) >= 3
    assert all(record.reason.startswith(reason) for record in bad)
    assert not [record for batch in batches(tmp_path, frozenset()) for record in batch.bad]


def test_a_cache_without_the_size_of_its_pictures_says_so(folder: Path) -> None:
    encode(folder, out="old")

    def forget(samples: dict[str, dict[str, bytes]]) -> None:
        for members in samples.values():
            record = json.loads(members["latents.json"])
            del record["size"]
            members["latents.json"] = json.dumps(record).encode()

    for shard in range(2):
        rewrite(folder / "old" / "manifest.json", forget, shard)
    batches(folder / "old", frozenset())
    with pytest.raises(DataError, match=r"^train-\d/s\d\d: its latents.json does not tell .*; encode its shard anew"):
        batches(folder / "old")


def test_a_sample_is_decoded_with_its_annotations() -> None:
    sample: dict[str, bytes | str] = {"__key__": "a/b", **scene(np.random.default_rng(3))}
    vocabulary = Vocabulary({}, NUMBERS, 3)
    found = decode_sample(sample, DecodeSettings(40, annotations=BOTH), vocabulary, 0, 0)
    assert found.labels is not None
    assert found.layout is not None
    assert check_boxes(found.labels, found.layout) == 2
    assert found.layout.crop == (4 / 48, 0.0, 44 / 48, 1.0)
