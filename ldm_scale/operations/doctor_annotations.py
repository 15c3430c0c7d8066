"""What boxes and label maps of a split look like: how many objects, which labels, what cannot be used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm_scale.data import Dataset
from ldm_scale.data.annotations import (
    MAP_EXTENSION,
    UNKNOWN,
    View,
    check_labels,
    layout_of,
    open_map,
    read_objects,
)
from ldm_scale.data.metadata import member_bytes
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import RawSample
from ldm_scale.operations.doctor_report import Report

UNKNOWN_SHARE = 0.5  # of a split's map pixels: above, a model sees mostly what nobody labelled


@dataclass(frozen=True)
class SeenAnnotations:
    """The annotations of one sample, where the manifest has names for them; None where they are malformed."""

    objects: tuple[int, ...] | None = None  # class of each object
    num_unseen: int = 0  # objects that lie outside the picture or are too small to be shown
    pixels: tuple[tuple[int, int], ...] | None = None  # (label, pixels) of the map
    faults: tuple[str, ...] = ()


def inspect_annotations(
    raw: RawSample, metadata: dict[str, Any], size: tuple[int, int], dataset: Dataset
) -> SeenAnnotations:
    """The annotations of a sample whose picture is of this (width, height)."""
    faults: list[str] = []
    objects: tuple[int, ...] | None = None
    num_unseen = 0
    if dataset.object_classes:
        try:
            found = read_objects(metadata, dataset.vocabulary.objects)
            whole = View(size, (0.0, 0.0, float(size[0]), float(size[1])), mirror=False)
            objects = tuple(label for label, _ in found)
            num_unseen = len(found) - len(layout_of(found, whole).objects)
        except BadSample as error:
            faults.append(str(error))
    pixels: tuple[tuple[int, int], ...] | None = None
    if dataset.map_labels:
        try:
            if MAP_EXTENSION not in raw:
                raise BadSample(f"no label map ({MAP_EXTENSION})")
            labels = np.asarray(open_map(member_bytes(raw, MAP_EXTENSION), size))
            check_labels(labels, len(dataset.map_labels))
            values, counts = np.unique(labels, return_counts=True)
            pixels = tuple(zip(values.tolist(), counts.tolist(), strict=True))
        except BadSample as error:
            faults.append(str(error))
    return SeenAnnotations(objects, num_unseen, pixels, tuple(faults))


@dataclass
class AnnotationTally:
    """Counts over the samples of a split, and what they say."""

    dataset: Dataset
    label: str  # what is looked at, in findings
    faults: Counter[str] = field(default_factory=Counter)
    faulty: dict[str, str] = field(default_factory=dict)  # key -> its first fault
    per_image: list[int] = field(default_factory=list)  # objects
    classes: Counter[int] = field(default_factory=Counter)
    num_unseen: int = 0
    pixels: Counter[int] = field(default_factory=Counter)  # of the maps, by label
    num_maps: int = 0

    def add(self, key: str, seen: SeenAnnotations) -> None:
        """Nothing; takes a sample in."""
        self.faults.update(seen.faults)
        if seen.faults:
            self.faulty[key] = seen.faults[0]
        if seen.objects is not None:
            self.per_image.append(len(seen.objects))
            self.classes.update(seen.objects)
            self.num_unseen += seen.num_unseen
        if seen.pixels is not None:
            self.num_maps += 1
            self.pixels.update(dict(seen.pixels))

    def judge(self, report: Report, max_named: int) -> None:
        """Nothing; the report says what was found, with at most `max_named` samples by name."""
        split = self.label
        for key, reason in list(self.faulty.items())[:max_named]:
            report.warning(reason, f"{split} {key}", "repair or remove it")
        if self.faulty:
            kinds = ", ".join(f"{count} x {reason}" for reason, count in self.faults.most_common())
            report.warning(f"{len(self.faulty)} samples cannot be used with boxes or maps: {kinds}", split)
        if self.per_image:
            report.ok(
                f"objects: {np.mean(self.per_image):.1f} an image, {min(self.per_image)} to {max(self.per_image)}; "
                f"{len(self.classes)} of {len(self.dataset.object_classes)} classes in the sample",
                split,
            )
        if self.num_unseen:
            report.warning(
                f"{self.num_unseen} objects lie outside their picture or are too small, and are left out", split
            )
        if self.num_maps:
            note = report.warning if self.unknown_share > UNKNOWN_SHARE else report.ok
            known = len(self.pixels) - (UNKNOWN in self.pixels)
            note(
                f"label maps: {known} of {len(self.dataset.map_labels)} labels in the sample, "
                f"{self.unknown_share:.1%} of the pixels unknown",
                split,
            )

    @property
    def unknown_share(self) -> float:
        """Of all pixels of the maps, those without a label."""
        return self.pixels[UNKNOWN] / max(1, self.pixels.total())

    def facts(self) -> dict[str, Any]:
        """The counts as JSON values; only of what the manifest has names for."""
        facts: dict[str, Any] = {}
        if self.dataset.object_classes:
            facts["objects"] = {
                "images": len(self.per_image),
                "total": sum(self.per_image),
                "most_in_an_image": max(self.per_image, default=0),
                "outside_or_too_small": self.num_unseen,
                "classes": {self.dataset.object_classes[n]: count for n, count in sorted(self.classes.items())},
            }
        if self.dataset.map_labels:
            total = max(1, self.pixels.total())
            facts["maps"] = {
                "images": self.num_maps,
                "unknown_share": round(self.unknown_share, 6),
                "share_of_pixels": {
                    self.dataset.map_labels[n]: round(count / total, 6)
                    for n, count in sorted(self.pixels.items())
                    if n != UNKNOWN
                },
            }
        if facts:
            facts["annotation_faults"] = dict(self.faults)
        return facts
