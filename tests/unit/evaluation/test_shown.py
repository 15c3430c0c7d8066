"""y as pictures: boxes, maps and holes where they are."""

import torch

from ldm_scale.conditioning.base import Conditions
from ldm_scale.data.annotations import Layout, SceneObject
from ldm_scale.evaluation.shown import captions, grid_side, label_colour, panels


def pixel(colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colour) / 127.5 - 1


def test_boxes_are_drawn_where_they_are() -> None:
    layout = Layout((SceneObject(1, (0.25, 0.5, 0.75, 1.0)),))
    shown = panels(Conditions(layouts=[layout, Layout()]), ["layout"], ["cat", "i"], side_px=101)["boxes"]
    assert shown.shape == (2, 3, 101, 101)
    coloured = (shown[0] != shown[1, :, :1, :1]).any(dim=0)
    rows, columns = (coloured.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 100, 25, 75)
    torch.testing.assert_close(shown[0, :, 50, 60], pixel(label_colour(1)))
    assert not coloured[60:95, 45:70].any(), "the inside is empty but for the name"
    assert (shown[1] == shown[1, :, :1, :1]).all()
    # The same square of a picture twice as wide: the box keeps its place in the square.
    wide = Layout((SceneObject(1, (0.625, 0.5, 0.875, 1.0)),), crop=(0.5, 0.0, 1.0, 1.0))
    assert torch.equal(panels(Conditions(layouts=[wide]), ["layout"], ["cat", "i"], side_px=101)["boxes"], shown[:1])


def test_maps_are_drawn_in_colours_and_holes_in_grey() -> None:
    maps = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    images, masks = torch.ones(1, 3, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    y = Conditions(maps=maps, images=images, masks=masks, low_resolution=torch.zeros(1, 3, 1, 1))
    shown = panels(y, ["semantic_map", "inpainting"], (), side_px=96)
    assert list(shown) == ["map", "image with hole"], "a small image that the model does not take is not shown"
    for place, label in (((0, 0), 0), ((0, 1), 1), ((1, 0), 2), ((1, 1), 255)):
        torch.testing.assert_close(shown["map"][0, :, *place], pixel(label_colour(label)))
    assert shown["image with hole"][0, 0].tolist() == [[0, 1], [1, 1]]
    assert len({label_colour(label) for label in range(64)}) == 64


def test_captions_say_what_the_model_was_given() -> None:
    y = Conditions(captions=["a cat", ""], classes=torch.tensor([1, -1]))
    assert captions(y, ["text"], ("dog", "cat"), 2) == ["a cat", ""]
    assert captions(y, ["classes", "text"], ("dog", "cat"), 2) == ["cat, a cat", ""]
    assert captions(y, ["layout"], (), 2) == ["", ""]


def test_pictures_are_enlarged_by_whole_factors() -> None:
    assert [grid_side(side) for side in (16, 64, 96, 128, 256)] == [96, 128, 96, 128, 256]
