"""Figures of conditioned samples: on real scenes high, on shuffled ones low, on made-up pictures exact."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.conditioning.degradation import reduce_bicubic
from ldm_scale.data.annotations import Layout, SceneObject
from ldm_scale.data.sources.openmoji_scenes import SceneRequest, make_scene
from ldm_scale.errors import DataError
from ldm_scale.evaluation.conditioned import (
    class_colours,
    colour_bins,
    evaluate_layouts,
    evaluate_maps,
    find_object,
    inpainting_values,
    super_resolution_values,
)
from ldm_scale.evaluation.reconstruction import bicubic_baseline, psnr
from ldm_scale.evaluation.similarity import ssim

SIDE = 64
CLASSES = {"1F34C": "banana", "1F347": "grapes", "1F332": "evergreen tree", "1F34E": "red apple", "1F433": "whale"}
REQUEST = SceneRequest(tuple(CLASSES), tuple(CLASSES.values()), SIDE, seed=0, max_objects=3)


def scenes(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, list[Layout]]:
    """Pixels, maps and layouts of scenes by number."""
    pictures, maps, layouts = [], [], []
    for number in range(first, first + count):
        members = make_scene(number, REQUEST).members
        pictures.append(np.asarray(Image.open(io.BytesIO(members["png"]))))
        maps.append(np.asarray(Image.open(io.BytesIO(members["seg.png"]))))
        objects = []
        for item in json.loads(members["json"])["objects"]:
            x, y, width, height = (value / SIDE for value in item["box"])
            objects.append(SceneObject(REQUEST.names.index(item["class"]), (x, y, x + width, y + height)))
        layouts.append(Layout(tuple(objects)))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.from_numpy(np.stack(maps)), layouts


@pytest.fixture(scope="module")
def colours() -> torch.Tensor:
    pixels, maps, _ = scenes(0, 80)
    return class_colours(pixels, maps, num_labels=1 + len(CLASSES))


def test_real_scenes_meet_their_layouts_and_not_those_of_others(colours: torch.Tensor) -> None:
    pixels, _, layouts = scenes(1000, 48)
    report = evaluate_layouts(pixels, layouts, colours[1:])
    assert report.num_objects == sum(len(layout.objects) for layout in layouts)
    assert report.iou > 0.8
    assert report.hits > 0.85
    assert report.shuffled_iou < 0.3
    assert report.shuffled_hits < 0.25
    assert report.colour_match > report.shuffled_colour_match + 0.25
    # Of the right boxes with the wrong classes.
    others = [Layout(tuple(SceneObject((o.label + 1) % 5, o.box) for o in layout.objects)) for layout in layouts]
    assert evaluate_layouts(pixels, others, colours[1:]).iou < 0.5


def test_real_scenes_meet_their_maps_and_not_those_of_others(colours: torch.Tensor) -> None:
    pixels, maps, _ = scenes(1000, 48)
    report = evaluate_maps(pixels, maps, colours)
    assert report.num_images == 48
    assert report.miou > 0.75
    assert report.shuffled_miou < 0.45
    # The figures fall with the image: noise hides colours by and by.
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    noisy = [evaluate_maps(pixels + strength * noise, maps, colours).miou for strength in (0.3, 1.0)]
    assert report.miou > noisy[0] > noisy[1]


def flat(*colours: tuple[float, float, float]) -> torch.Tensor:
    """Pixels (1, 3, 8, 8 per colour): squares side by side."""
    return torch.cat([torch.tensor(c).view(1, 3, 1, 1).expand(1, 3, 8, 8) for c in colours], dim=3)


RED, BLUE, GREY = (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (0.0, 0.0, 0.0)


def test_colours_of_classes_are_counted_where_the_map_is_known() -> None:
    image = flat(RED, BLUE, GREY)
    maps = torch.full((1, 8, 24), 255, dtype=torch.uint8)
    maps[..., :12] = 1
    table = class_colours(image, maps, num_labels=3)
    red, blue = (int(colour_bins(flat(colour))[0, 0, 0]) for colour in (RED, BLUE))
    assert table.shape == (3, 125)
    assert not table[0].any()
    assert not table[2].any()
    assert table[1, red] == pytest.approx(2 / 3)
    assert table[1, blue] == pytest.approx(1 / 3)
    assert colour_bins(flat((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))).flatten().unique().tolist() == [0, 124]


def test_an_object_is_found_where_its_colours_are() -> None:
    image = flat(GREY, GREY, GREY, GREY).clone()
    image[..., 3:7, 17:23] = torch.tensor(RED).view(3, 1, 1)
    red = torch.nn.functional.one_hot(colour_bins(flat(RED))[0, 0, 0], 125).double()
    assert find_object(colour_bins(image)[0], red, 4, 6) == (3, 17)
    wanted = SceneObject(0, (17 / 32, 3 / 8, 23 / 32, 7 / 8))
    moved = SceneObject(0, (14 / 32, 3 / 8, 20 / 32, 7 / 8))
    report = evaluate_layouts(image.expand(2, -1, -1, -1), [Layout((wanted,)), Layout((moved,))], red[None])
    assert report.iou == pytest.approx((1 + 1 / 3) / 2)  # 3 of 9 columns in common
    assert report.hits == 0.5
    assert report.colour_match == pytest.approx((1 + 1 / 2) / 2)
    assert report.shuffled_iou == pytest.approx(report.iou)
    # The same two in a picture of which the image is the lower right quarter.
    quarter = (0.5, 0.5, 1.0, 1.0)
    cropped = [
        Layout((SceneObject(0, tuple(0.5 + value / 2 for value in item.box)),), quarter)  # type: ignore[arg-type]
        for item in (wanted, moved)
    ]
    assert evaluate_layouts(image.expand(2, -1, -1, -1), cropped, red[None]) == report


def test_iou_of_a_map_is_counted_over_known_pixels() -> None:
    image = flat(RED, BLUE, GREY).expand(2, -1, -1, -1)
    table = torch.stack([torch.zeros(125), *(torch.eye(125)[colour_bins(flat(c))[0, 0, 0]] for c in (RED, BLUE))])
    maps = torch.zeros(2, 8, 24, dtype=torch.uint8)
    maps[..., :8], maps[..., 8:16] = 1, 2
    assert evaluate_maps(image, maps, table.double()).miou == 1
    maps[0, :4] = 255
    assert evaluate_maps(image, maps, table.double()).miou == 1
    wrong = flat(RED, RED, GREY).expand(2, -1, -1, -1)  # red: 8 of 16 columns; blue: nothing
    assert evaluate_maps(wrong, maps, table.double()).miou == pytest.approx((0.5 + 0 + 1) / 3)


def test_layouts_without_objects_are_refused() -> None:
    with pytest.raises(DataError, match="no object in any of the layouts"):
        evaluate_layouts(flat(RED), [Layout()], torch.zeros(1, 125))


def test_enlarged_images_beside_bicubic() -> None:
    originals, _, _ = scenes(0, 4)
    small = reduce_bicubic(originals, 4)
    values = super_resolution_values(originals, originals, small)
    assert values["psnr_db"].isposinf().all()
    torch.testing.assert_close(values["ssim"], torch.ones(4, dtype=torch.float64))
    bicubic = bicubic_baseline(originals, 4)  # of small images on more than 256 levels
    torch.testing.assert_close(values["bicubic_psnr_db"], psnr(bicubic, originals), atol=0.05, rtol=0)
    torch.testing.assert_close(values["bicubic_ssim"], ssim(bicubic, originals), atol=0.01, rtol=0)
    noisy = originals + 0.1 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(0))
    worse = super_resolution_values(noisy, originals, small)
    assert 26 < worse["psnr_db"].mean() < 28  # 10 log10(4 / 0.01) = 26, less what is clamped
    assert torch.equal(worse["bicubic_psnr_db"], values["bicubic_psnr_db"])
    assert 30 < worse["consistency_psnr_db"].mean() < 45  # a quarter of the noise is left


def test_filled_holes_are_judged_by_their_pixels() -> None:
    originals = flat(RED, GREY).repeat(4, 1, 1, 1)  # 8 rows, 16 columns
    masks = torch.zeros(4, 1, 8, 16)
    masks[:3, :, :4] = 1  # the upper half
    masks[2] = 1
    samples = originals.clone()
    samples[0, :, :4] += 0.2  # in the hole
    samples[1, 0, 7, 15] += 0.2  # out of it
    values = inpainting_values(samples, originals, masks)
    assert values["known_exact"].tolist() == [1, 0, 1, 1]
    assert values["hole_psnr_db"][0] == pytest.approx(20, abs=1e-5)  # 10 log10(4 / 0.04)
    assert values["hole_psnr_db"][1:3].isposinf().all()
    # Half is (1, -1, -1), half 0, their mean lies half way: squares of 1/4.
    assert values["mean_colour_psnr_db"][0] == pytest.approx(12.0412, abs=1e-4)
    # All is hole: grey, which is wrong by 1 in one half.
    assert values["mean_colour_psnr_db"][2] == pytest.approx(9.0309, abs=1e-4)
    assert values["hole_psnr_db"][3].isnan()
    assert values["mean_colour_psnr_db"][3].isnan()
