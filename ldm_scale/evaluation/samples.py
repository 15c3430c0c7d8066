"""What samples of a conditioned model are worth beside the real images whose y they were given.

The distance of all samples from the real images, and for each kind of conditioning whether an image is what was asked
for. Samples and maps are kept whole only where boxes or maps are judged, as 8-bit numbers; else batches pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale.conditioning.base import Conditions
from ldm_scale.conditioning.classes import NO_CLASS
from ldm_scale.data.annotations import Layout, shown_objects
from ldm_scale.errors import DataError
from ldm_scale.evaluation.conditioned import (
    class_colours,
    evaluate_layouts,
    evaluate_maps,
    inpainting_values,
    super_resolution_values,
)
from ldm_scale.evaluation.features import ImageFeatures
from ldm_scale.evaluation.frechet import frechet_figures
from ldm_scale.evaluation.images import eight_bits
from ldm_scale.evaluation.reconstruction import psnr, summary
from ldm_scale.evaluation.similarity import ssim

BACKGROUND = "background"
PROTOCOLS = {
    "layout": "boxes are looked for by the colours of their class, counted in the real images' maps; shuffled: each "
    "image judged by the next one's boxes",
    "semantic_map": "pixels are given to the map's label with the likeliest colours, counted in the real images; "
    "shuffled: each image judged by the next one's map",
    "low_resolution": "PSNR and SSIM to the original on 8-bit pixels; consistency: made small by bicubic, to the small "
    "image; reconstructions: what the autoencoder leaves of the original",
    "inpainting": "PSNR over the pixels of the hole on 8-bit pixels; baseline: the known pixels' mean colour; "
    "reconstructions: what the autoencoder leaves of the original",
    "text": "nearest real image, by cosine of centred features, has the sample's caption",
    "classes": "nearest real image, by cosine of centred features, has the sample's class",
}
PROTOCOLS["frozen_text"] = PROTOCOLS["text"]
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Judge:
    """What samples are judged with."""

    kinds: tuple[str, ...]  # sections of the model's conditioning
    features: ImageFeatures
    frechet_name: str
    num_components: int | None  # of the features; None = all
    reconstruct: Callable[[Tensor], Tensor]  # pixels to what the autoencoder leaves of them
    object_classes: tuple[str, ...] = ()  # of the data; so are the labels
    map_labels: tuple[str, ...] = ()


class SampleMeter:
    """Collects figures over batches of samples and the real images whose y they were given."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.num_images = 0
        self._features: list[tuple[Tensor, Tensor, Tensor]] = []  # of real images, samples, reconstructions
        self._values: dict[str, list[dict[str, Tensor]]] = {"low_resolution": [], "inpainting": []}
        self._labels: dict[str, list[Hashable]] = {"text": [], "classes": []}
        self._pixels: list[tuple[Tensor, Tensor]] = []  # real images, samples; uint8
        self._maps: list[Tensor] = []
        self._layouts: list[Layout] = []

    @torch.inference_mode()
    def add(self, samples: Tensor, originals: Tensor, y: Conditions, maps: Tensor | None = None) -> None:
        """Nothing; measures one batch. `maps` are those of the images, which boxes are judged with too.

        Shapes: samples, originals (B, 3, H, W) in [-1, 1] on the CPU, maps (B, H, W) uint8.
        """
        kinds, extract = self._judge.kinds, self._judge.features.extract
        real, made = eight_bits(originals), eight_bits(samples)
        again = eight_bits(self._judge.reconstruct(real))
        self._features.append((extract(real), extract(made), extract(again)))
        if "inpainting" in kinds:
            assert y.masks is not None, "the samples were given masks"
            # Before any rounding, which would hide a difference.
            exact = inpainting_values(samples, originals, y.masks)["known_exact"]
            limit = inpainting_values(again, real, y.masks)["hole_psnr_db"]
            self._values["inpainting"].append(
                inpainting_values(made, real, y.masks) | {"known_exact": exact, "reconstruction_psnr_db": limit}
            )
        if "low_resolution" in kinds:
            assert y.low_resolution is not None, "the samples were given small images"
            limits = {"reconstruction_psnr_db": psnr(again, real), "reconstruction_ssim": ssim(again, real)}
            self._values["low_resolution"].append(super_resolution_values(made, real, y.low_resolution) | limits)
        if y.captions is not None and ("text" in kinds or "frozen_text" in kinds):
            self._labels["text"] += y.captions
        if y.classes is not None and "classes" in kinds:
            self._labels["classes"] += y.classes.tolist()
        if maps is not None and ("layout" in kinds or "semantic_map" in kinds):
            self._pixels.append((_bytes(real), _bytes(made)))
            self._maps.append(maps)
            self._layouts += y.layouts or ()
        self.num_images += len(samples)

    @torch.inference_mode()
    def figures(self) -> dict[str, Any]:
        """All figures by name, for JSON: `frechet`, and one entry for each kind of conditioning.

        Units: PSNR in dB, IoU and agreement from 0 to 1.
        Raises: DataError if there was no image.
        """
        if not self.num_images:
            raise DataError("no image to evaluate samples on; name another split")
        real, made, reconstructed = (torch.cat(part) for part in zip(*self._features, strict=True))
        figures: dict[str, Any] = {"frechet": self._frechet(real, made, reconstructed)}
        for kind in self._judge.kinds:
            if kind in self._values:
                figures[kind] = _means(self._values[kind])
            elif kind in ("layout", "semantic_map"):
                figures[kind] = self._colours(kind)
            else:
                labels = self._labels["classes" if kind == "classes" else "text"]
                figures[kind] = nearest_agreement(real, made, reconstructed, labels)
        return figures

    def _frechet(self, real: Tensor, made: Tensor, reconstructed: Tensor) -> dict[str, Any]:
        samples, floor = (frechet_figures(real, other, self._judge.num_components) for other in (made, reconstructed))
        figures = {
            "name": self._judge.frechet_name,
            "distance": samples["distance"],
            "reconstructions": floor["distance"],
            "halves_sampled": samples["halves_reconstructed"],
            "halves_reconstructed": floor["halves_reconstructed"],
            "halves_real": samples["halves_original"],
        }
        return figures | {name: samples[name] for name in ("explained_variance", "not_measured") if name in samples}

    def _colours(self, kind: str) -> dict[str, Any]:
        """Boxes or maps by colour, of samples and of the real images; or why not."""
        judge = self._judge
        missing = [name for name in judge.object_classes if name not in judge.map_labels]
        reason = None
        if self.num_images < 2:
            reason = "one image has no other to be shuffled with"
        elif kind == "layout" and (missing or not self._maps):
            what = f"no map label is named {missing[0]!r}" if judge.map_labels else "the data have no maps"
            reason = f"{what}, which would tell the colours of the boxes' classes"
        elif kind == "layout" and not any(map(shown_objects, self._layouts)):
            reason = "no layout has an object"
        if reason is not None:
            return {"not_measured": reason}
        real, made = (torch.cat(part).float().div(127.5).sub(1) for part in zip(*self._pixels, strict=True))
        maps = torch.cat(self._maps)
        table = class_colours(real, maps, len(judge.map_labels))
        if kind == "layout":
            rows = table[[judge.map_labels.index(name) for name in judge.object_classes]]
            reports = [asdict(evaluate_layouts(images, self._layouts, rows)) for images in (made, real)]
            return reports[0] | {f"real_{name}": reports[1][name] for name in ("iou", "hits", "colour_match")}
        background = judge.map_labels.index(BACKGROUND) if BACKGROUND in judge.map_labels else None
        reports = [asdict(evaluate_maps(images, maps, table, background)) for images in (made, real)]
        return reports[0] | {"real_miou": reports[1]["miou"]}


def nearest_agreement(real: Tensor, made: Tensor, reconstructed: Tensor, labels: Sequence[Hashable]) -> dict[str, Any]:
    """Share of images whose nearest real image has their label, and what chance and the originals themselves reach.

    `real_others` is of real images and the nearest other one, over labels that come more than once. Images without a
    label ("" or no class) are left out.
    Shapes: features (N, D), row i with labels[i].
    """
    wanted = [i for i, label in enumerate(labels) if label not in ("", NO_CLASS)]
    if not wanted:
        return {"not_measured": "no image has one"}
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels[i] for i in wanted))}
    own = torch.tensor([numbers[labels[i]] for i in wanted])
    centre = real[wanted].mean(dim=0)
    base, samples, again = (F.normalize(part[wanted] - centre, dim=1) for part in (real, made, reconstructed))
    counts = torch.bincount(own)[own]
    others = _nearest(base, base, leave_self_out=True) if len(wanted) > 1 else torch.zeros(1, dtype=torch.int64)
    repeated = counts > 1
    return {
        "num_images": len(wanted),
        "num_labels": len(numbers),
        "agreement": _share(own[_nearest(samples, base)] == own),
        "chance": float((counts / len(wanted)).mean()),
        "reconstructions": _share(own[_nearest(again, base)] == own),
        "real_others": _share((own[others] == own)[repeated]) if repeated.any() else None,
    }


def _nearest(rows: Tensor, base: Tensor, *, leave_self_out: bool = False) -> Tensor:
    """Number of each row's nearest of `base`, by cosine. Shapes: unit vectors (N, D) both; returns (N,)."""
    found = []
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        similarity = rows[begin : begin + _ROWS_AT_ONCE] @ base.T
        if leave_self_out:
            similarity[torch.arange(len(similarity)), torch.arange(begin, begin + len(similarity))] = -torch.inf
        found.append(similarity.argmax(dim=1))
    return torch.cat(found)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _means(parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Mean and deviation of each figure over the images that have it."""
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    figures: dict[str, Any] = {name: summary(value[~value.isnan()]) for name, value in values.items()}
    main = next(iter(values.values()))
    return figures | {"num_images": int((~main.isnan()).sum()), "exact_images": int(main.isposinf().sum())}


def _bytes(pixels: Tensor) -> Tensor:
    return ((pixels + 1) * 127.5).round().to(torch.uint8)
