"""Whether images are what they were conditioned on: enlarged and filled images, boxes and semantic maps.

Each figure stands beside what it would be without a model: bicubic enlargement, the mean colour, or the wishes of the
next image (of at least two). Boxes and maps are judged by colour alone, without a trained network: histograms of the
classes are taken from real images with maps. That suits classes that have colours of their own, such as OpenMoji's, and
no photographs. Real scenes of 64 px do not reach 1 either (256 of them, 15 classes): boxes 0.90, shuffled 0.16; maps
0.88, shuffled 0.32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale.conditioning.degradation import reduce_bicubic
from ldm_scale.conditioning.semantic_map import UNKNOWN
from ldm_scale.data.annotations import Layout, SceneObject, shown_objects
from ldm_scale.errors import DataError
from ldm_scale.evaluation.reconstruction import PEAK_TO_PEAK, psnr
from ldm_scale.evaluation.similarity import ssim

BINS = 5  # per channel
HIT_IOU = 0.5
SHARES = ("known_exact",)  # means of ones and zeros
_FLOOR = 1e-3  # of a colour's probability in a class: samples have colours that no real image showed
_NEIGHBOURHOOD = 3  # pixels along each side whose colours judge one pixel


@dataclass(frozen=True)
class LayoutReport:
    """Means over the objects of all layouts; `shuffled_*` with each image judged by the next one's layout."""

    num_objects: int
    iou: float  # of the wanted box and where the class's colours are found
    hits: float  # share of objects with an IoU of at least HIT_IOU
    colour_match: float  # common part of the histograms of wanted box and class
    shuffled_iou: float
    shuffled_hits: float
    shuffled_colour_match: float


@dataclass(frozen=True)
class MapReport:
    """Means over images; `shuffled_miou` with each image judged by the next one's map."""

    num_images: int
    miou: float  # mean over the labels that a map has
    shuffled_miou: float


@torch.no_grad()
def super_resolution_values(samples: Tensor, originals: Tensor, low_resolution: Tensor) -> dict[str, Tensor]:
    """How near enlarged images are to what was made small, and bicubic enlargements, of each image.

    A sampler that invents detail may well stay below bicubic's PSNR. `consistency_psnr_db` is of the samples made small
    again (by bicubic) to the small images.
    Shapes: samples, originals (N, 3, H, W) and low_resolution (N, 3, h, w), in [-1, 1]; returns (N,) float64 each.
    """
    size = originals.shape[-2:]
    enlarged = F.interpolate(low_resolution.float(), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    samples = samples.float().clamp(-1, 1)
    small = reduce_bicubic(samples, size[0] // low_resolution.shape[-2])
    return {
        "psnr_db": psnr(samples, originals),
        "ssim": ssim(samples, originals),
        "bicubic_psnr_db": psnr(enlarged, originals),
        "bicubic_ssim": ssim(enlarged, originals),
        "consistency_psnr_db": psnr(small, low_resolution),
    }


@torch.no_grad()
def inpainting_values(samples: Tensor, originals: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """How near filled holes are to what was there, and whether the rest is untouched, of each image.

    The baseline fills the hole with the mean colour of the rest (medium grey, if there is no rest). NaN where there is
    no hole. `known_exact` is 1 where every known pixel is the original's, else 0.
    Shapes: samples, originals (N, 3, H, W) in [-1, 1], masks (N, 1, H, W), 1 in the hole; returns (N,) float64 each.
    """
    hole = masks.to(samples.device).bool()
    known = ~hole
    count = known.double().sum(dim=(2, 3), keepdim=True)
    mean = (originals.double() * known).sum(dim=(2, 3), keepdim=True) / count.clamp(min=1)
    return {
        "hole_psnr_db": _hole_psnr(samples, originals, hole),
        "mean_colour_psnr_db": _hole_psnr(mean.expand_as(samples), originals, hole),
        "known_exact": ((samples == originals) | hole).flatten(start_dim=1).all(dim=1).double(),
    }


def _hole_psnr(x: Tensor, y: Tensor, hole: Tensor) -> Tensor:
    squares = ((x.double() - y.double()).square() * hole).sum(dim=(1, 2, 3))
    return 10.0 * torch.log10(PEAK_TO_PEAK**2 / (squares / (x.shape[1] * hole.sum(dim=(1, 2, 3)))))


def colour_bins(images: Tensor) -> Tensor:
    """Number of each pixel's colour. Shapes: pixels (N, 3, H, W) in [-1, 1]; returns (N, H, W) below BINS^3."""
    levels = ((images.float().clamp(-1, 1) + 1) * (BINS / 2)).long().clamp(max=BINS - 1)
    return (levels[:, 0] * BINS + levels[:, 1]) * BINS + levels[:, 2]


def class_colours(images: Tensor, maps: Tensor, num_labels: int) -> Tensor:
    """The distribution of colours of each label in real images; zeros for those that do not occur.

    Shapes: pixels (N, 3, H, W), maps (N, H, W); returns (num_labels, BINS^3) float64.
    """
    known = maps < num_labels
    cells = maps[known].long() * BINS**3 + colour_bins(images)[known]
    counts = torch.bincount(cells, minlength=num_labels * BINS**3).view(num_labels, -1).double()
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def evaluate_layouts(images: Tensor, layouts: Sequence[Layout], colours: Tensor) -> LayoutReport:
    """How well images meet layouts: their objects where they stand in the squares that are shown.

    Shapes: pixels (N, 3, H, W), colours (object classes, BINS^3).
    Raises: DataError if no layout has an object there.
    """
    bins = colour_bins(images).cpu()
    shuffled = [*layouts[1:], *layouts[:1]]
    figures = []
    for wanted in (layouts, shuffled):
        pairs = zip(bins, wanted, strict=True)
        found = [_judge(row, item, colours) for row, layout in pairs for item in shown_objects(layout)]
        if not found:
            raise DataError("no object in any of the layouts to judge images by: give images that have some")
        table = torch.tensor(found, dtype=torch.float64)
        figures += [table[:, 0].mean(), (table[:, 0] >= HIT_IOU).double().mean(), table[:, 1].mean()]
    return LayoutReport(len(found), *(float(figure) for figure in figures))


def find_object(bins: Tensor, colours: Tensor, height: int, width: int) -> tuple[int, int]:
    """(top, left) of the window in which most pixels have colours that are the object's rather than the image's.

    By backprojection of the ratio of the two histograms. Shapes: bins (H, W), colours (BINS^3,).
    Source: Swain and Ballard 1991, "Color indexing", section 4.
    """
    image = torch.bincount(bins.flatten(), minlength=len(colours)).double()
    ratio = (colours * height * width / image.clamp(min=1)).clamp(max=1)
    sums = F.avg_pool2d(ratio[bins][None, None], (height, width), stride=1)[0, 0]
    best = int(sums.argmax())
    return best // sums.shape[1], best % sums.shape[1]


def _judge(bins: Tensor, item: SceneObject, colours: Tensor) -> tuple[float, float]:
    """(IoU, colour match) of one wanted object."""
    rows, columns = bins.shape
    left, right = _span(item.box[0], item.box[2], columns)
    top, bottom = _span(item.box[1], item.box[3], rows)
    height, width = bottom - top, right - left
    found_top, found_left = find_object(bins, colours[item.label], height, width)
    down, across = height - abs(found_top - top), width - abs(found_left - left)
    common = max(down, 0) * max(across, 0)
    window = torch.bincount(bins[top:bottom, left:right].flatten(), minlength=colours.shape[1]) / (height * width)
    return common / (2 * height * width - common), float(torch.minimum(window, colours[item.label]).sum())


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    """A box's pixels along one axis, at least one."""
    begin = min(round(low * size), size - 1)
    return begin, max(round(high * size), begin + 1)


def evaluate_maps(images: Tensor, maps: Tensor, colours: Tensor, background: int | None = 0) -> MapReport:
    """How well images meet semantic maps.

    Shapes: pixels (N, 3, H, W), maps (N, H, W), colours (labels, BINS^3). `background` is the label whose colours every
    image chooses itself.
    """
    bins = colour_bins(images).cpu()
    scores = [
        torch.tensor([_miou(row, wanted, colours, background) for row, wanted in zip(bins, order, strict=True)]).mean()
        for order in (maps.cpu().long(), maps.cpu().long().roll(-1, dims=0))
    ]
    return MapReport(len(images), *(float(score) for score in scores))


def _miou(bins: Tensor, wanted: Tensor, colours: Tensor, background: int | None) -> float:
    """Mean IoU of the wanted labels with the most likely ones of these, pixel by pixel."""
    labels = [label for label in torch.bincount(wanted.flatten()).nonzero().flatten().tolist() if label != UNKNOWN]
    rows = []
    for label in labels:
        shares = colours[label]
        if label == background:
            shares = torch.bincount(bins[wanted == label], minlength=len(shares)).double()
            shares = shares / shares.sum()
        rows.append(torch.log(shares + _FLOOR)[bins])
    likelihood = F.avg_pool2d(
        torch.stack(rows)[None], _NEIGHBOURHOOD, stride=1, padding=_NEIGHBOURHOOD // 2, count_include_pad=False
    )[0]
    found = torch.tensor(labels)[likelihood.argmax(dim=0)]
    known = wanted != UNKNOWN
    values = []
    for label in labels:
        a, b = (found == label) & known, wanted == label
        values.append(float((a & b).sum() / (a | b).sum()))
    return sum(values) / len(values)
