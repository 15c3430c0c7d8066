"""What samples of a conditioned model are worth beside the real images whose y they were given.

The distance of all samples from the real images, and for each kind of conditioning whether an image is what was asked
for. Samples and maps are kept whole only where boxes or maps are judged, as 8-bit numbers; else batches pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale.conditioning.base import Conditions
from ldm_scale.conditioning.classes import NO_CLASS
from ldm_scale.data.annotations import Layout, SceneObject, shown_objects
from ldm_scale.errors import DataError, NumericsError
from ldm_scale.evaluation.clip_score import ClipScorer, clip_figure
from ldm_scale.evaluation.conditioned import (
    SHARES,
    class_colours,
    evaluate_layouts,
    evaluate_maps,
    inpainting_values,
    super_resolution_values,
)
from ldm_scale.evaluation.feature_sets import FeatureSet
from ldm_scale.evaluation.features import ImageFeatures
from ldm_scale.evaluation.frechet import frechet_figures
from ldm_scale.evaluation.images import eight_bits
from ldm_scale.evaluation.reconstruction import num_summarised, psnr, summary
from ldm_scale.evaluation.rows import Rows
from ldm_scale.evaluation.set_figures import Network, set_figures
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


class RealFeatures:
    """Features of real images and of what an autoencoder leaves of them, for several models beside the same images."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Tensor]] = {}

    def get(self, numbers: Sequence[int]) -> dict[str, Tensor] | None:
        """Those of some images, if all of them are known. Shapes: (B, D) each."""
        rows = [self._rows.get(number) for number in numbers]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            return None
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}

    def put(self, numbers: Sequence[int], rows: dict[str, Tensor]) -> None:
        """Nothing; keeps rows of some images."""
        for place, number in enumerate(numbers):
            self._rows[number] = {name: tensor[place] for name, tensor in rows.items()}


@dataclass(frozen=True)
class Judge:
    """What samples are judged with."""

    kinds: tuple[str, ...]  # sections of the model's conditioning
    features: ImageFeatures
    frechet_name: str
    num_components: int | None  # of the features; None = all
    network: Network  # that the features are of
    description: dict[str, Any]  # of what takes the features
    reconstruct: Callable[[Tensor], Tensor]  # pixels to what the autoencoder leaves of them
    classifier: Tensor | None = None  # whose logits are the features times it
    scorer: ClipScorer | None = None
    reference: FeatureSet | None = None  # that the samples are set beside; None = the real images
    known: RealFeatures = field(default_factory=RealFeatures)  # of these images and this autoencoder
    resamples: int = 0  # halves of the samples that confidence intervals are taken from
    object_classes: tuple[str, ...] = ()  # of the data; so are the labels
    map_labels: tuple[str, ...] = ()


class SampleMeter:
    """Collects figures over batches of samples and the real images whose y they were given."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.rows = Rows()

    @property
    def num_images(self) -> int:
        """Samples so far."""
        return len(self.rows)

    @torch.inference_mode()
    def add(
        self,
        samples: Tensor,
        originals: Tensor,
        y: Conditions,
        numbers: Sequence[int],
        maps: Tensor | None = None,
    ) -> None:
        """Nothing; measures one batch. `maps` are those of the images, which boxes are judged with too.

        `numbers` are the images' places in the order of evaluation.
        Shapes: samples, originals (B, 3, H, W) in [-1, 1] on the CPU, maps (B, H, W) uint8.
        Raises: NumericsError if a sample is not finite.
        """
        finite = torch.isfinite(samples).flatten(start_dim=1).all(dim=1)
        if not finite.all():
            first = numbers[int((~finite).nonzero()[0])]
            raise NumericsError(
                f"{int((~finite).sum())} of {len(samples)} samples are not finite, the first for image {first} in the "
                "order of evaluation: guide less, use float32, or look at these weights"
            )
        kinds, extract, scorer = self._judge.kinds, self._judge.features.extract, self._judge.scorer
        real, made = eight_bits(originals), eight_bits(samples)
        known = self._judge.known.get(numbers)
        if known is None or {"inpainting", "low_resolution"} & set(kinds):
            again = eight_bits(self._judge.reconstruct(real))
        if known is None:
            known = {"real": extract(real), "again": extract(again)}
            self._judge.known.put(numbers, known)
        rows = {"made": extract(made), **known}
        lists: dict[str, Sequence[Any]] = {}
        if "inpainting" in kinds:
            assert y.masks is not None, "the samples were given masks"
            # Before any rounding, which would hide a difference.
            exact = inpainting_values(samples, originals, y.masks)["known_exact"]
            limit = inpainting_values(again, real, y.masks)["hole_psnr_db"]
            found = inpainting_values(made, real, y.masks) | {"known_exact": exact, "reconstruction_psnr_db": limit}
            rows |= {f"inpainting.{name}": value for name, value in found.items()}
        if "low_resolution" in kinds:
            assert y.low_resolution is not None, "the samples were given small images"
            limits = {"reconstruction_psnr_db": psnr(again, real), "reconstruction_ssim": ssim(again, real)}
            found = super_resolution_values(made, real, y.low_resolution) | limits
            rows |= {f"low_resolution.{name}": value for name, value in found.items()}
        if y.captions is not None and ("text" in kinds or "frozen_text" in kinds):
            lists["text"] = y.captions
            if scorer is not None:
                rows |= {"clip.made": scorer.images(made), "clip.real": scorer.images(real)}
                rows["clip.text"] = scorer.texts(y.captions)
        if y.classes is not None and "classes" in kinds:
            lists["classes"] = y.classes.tolist()
        if maps is not None and ("layout" in kinds or "semantic_map" in kinds):
            rows |= {"pixels.real": _bytes(real), "pixels.made": _bytes(made), "maps": maps}
            if y.layouts is not None:
                lists["layouts"] = [_plain(layout) for layout in y.layouts]
        self.rows.add(numbers, rows, lists)

    @torch.inference_mode()
    def figures(self) -> dict[str, Any]:
        """All figures by name, for JSON: `frechet`, `samples`, and one entry for each kind of conditioning.

        Units: PSNR in dB, IoU and agreement from 0 to 1.
        Raises: DataError if there was no image.
        """
        if not self.num_images:
            raise DataError("no image to evaluate samples on; name another split")
        real, made, reconstructed = (self.rows.tensor(name) for name in ("real", "made", "again"))
        figures: dict[str, Any] = {
            "frechet": self._frechet(real, made, reconstructed),
            "samples": self._samples(real, made),
        }
        for kind in self._judge.kinds:
            if kind in ("low_resolution", "inpainting"):
                figures[kind] = _means(self.rows.tensors(f"{kind}."))
            elif kind in ("layout", "semantic_map"):
                figures[kind] = self._colours(kind)
            else:
                name = "classes" if kind == "classes" else "text"
                labels = self.rows.values(name) if name in self.rows else []
                figures[kind] = nearest_agreement(real, made, reconstructed, labels)
        return figures

    def _samples(self, real: Tensor, made: Tensor) -> dict[str, Any]:
        """The samples beside the reference, and their captions."""
        judge = self._judge
        reference = judge.reference or FeatureSet(real, judge.description, {})
        figures = set_figures(
            FeatureSet(made, judge.description, {}), reference, judge.network, judge.classifier, judge.resamples
        )
        if "clip.made" in self.rows:
            images, texts, originals = (self.rows.tensor(f"clip.{name}") for name in ("made", "text", "real"))
            captions = self.rows.values("text")
            figures["clip_score"] = clip_figure(images, texts, captions, originals, judge.resamples)
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

    def _layouts(self) -> list[Layout]:
        return [
            Layout(tuple(SceneObject(label, (x0, y0, x1, y1)) for label, x0, y0, x1, y1 in objects), tuple(crop))
            for objects, crop in self.rows.values("layouts")
        ]

    def _colours(self, kind: str) -> dict[str, Any]:
        """Boxes or maps by colour, of samples and of the real images; or why not."""
        judge = self._judge
        missing = [name for name in judge.object_classes if name not in judge.map_labels]
        reason = None
        if self.num_images < 2:
            reason = "one image has no other to be shuffled with"
        elif kind == "layout" and (missing or "maps" not in self.rows):
            what = f"no map label is named {missing[0]!r}" if judge.map_labels else "the data have no maps"
            reason = f"{what}, which would tell the colours of the boxes' classes"
        elif kind == "layout" and not any(map(shown_objects, self._layouts())):
            reason = "no layout has an object"
        if reason is not None:
            return {"not_measured": reason}
        real, made = (self.rows.tensor(f"pixels.{name}").float().div(127.5).sub(1) for name in ("real", "made"))
        maps = self.rows.tensor("maps")
        table = class_colours(real, maps, len(judge.map_labels))
        if kind == "layout":
            rows = table[[judge.map_labels.index(name) for name in judge.object_classes]]
            layouts = self._layouts()
            reports = [asdict(evaluate_layouts(images, layouts, rows)) for images in (made, real)]
            return reports[0] | {f"real_{name}": reports[1][name] for name in ("iou", "hits", "colour_match")}
        background = judge.map_labels.index(BACKGROUND) if BACKGROUND in judge.map_labels else None
        reports = [asdict(evaluate_maps(images, maps, table, background)) for images in (made, real)]
        return reports[0] | {"real_miou": reports[1]["miou"]}


def _plain(layout: Layout) -> list[Any]:
    """A layout as JSON has it."""
    return [[[item.label, *item.box] for item in layout.objects], list(layout.crop)]


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


def _means(values: dict[str, Tensor]) -> dict[str, Any]:
    """Mean and deviation of each figure over the images that have it."""
    figures: dict[str, Any] = {
        name: summary(value) | {"num_images": num_summarised(value)} for name, value in values.items()
    }
    for name in set(values) & set(SHARES):
        figures[name]["share"] = True
    main = next(iter(values.values()))
    return figures | {"num_images": int((~main.isnan()).sum()), "exact_images": int(main.isposinf().sum())}


def _bytes(pixels: Tensor) -> Tensor:
    return ((pixels + 1) * 127.5).round().to(torch.uint8)
