"""Figures of a set of samples beside a reference set, from features of both: a pure function of all features.

Frechet and kernel distance, precision, recall, density, coverage, and with Inception's classifier its score. Published
names (FID, KID, IS) are given to figures of the published network with the published weights alone; on other features
the network's name is part of the figure's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_scale.evaluation import fidelity, neighbours
from ldm_scale.evaluation.feature_sets import FeatureSet, require_finite, require_one_extractor
from ldm_scale.evaluation.features import FeatureSpace, Gaussian
from ldm_scale.evaluation.intervals import Halves, interval_around, share_interval

DEFINITIONS = {
    "frechet": "squared Frechet distance of Gaussians with the sets' moments, covariances by N - 1 (arXiv:1706.08500)",
    "kernel": f"squared MMD of the cubic kernel, without bias, mean over {fidelity.SUBSETS} subsets of "
    f"{fidelity.SUBSET_SIZE} or all there are, by torch-fidelity (arXiv:1801.01401)",
    "precision": f"k = {neighbours.PRECISION_NEIGHBOUR} (arXiv:1904.06991)",
    "recall": f"k = {neighbours.PRECISION_NEIGHBOUR} (arXiv:1904.06991)",
    "density": f"k = {neighbours.DENSITY_NEIGHBOUR} (arXiv:2002.09797)",
    "coverage": f"k = {neighbours.DENSITY_NEIGHBOUR} (arXiv:2002.09797)",
    "inception_score": f"over 1008 logits without bias, mean of {fidelity.SPLITS} splits, by torch-fidelity "
    "(arXiv:1606.03498)",
}
_ROUNDING = 1e-12
ALL_EQUAL = "all halves of the samples have this very value, which does not tell how far other samples lie apart"
KERNEL_METHOD = (
    "Student's t with the delete-one jackknife of the mean over subsets; of the samples, reference and draws of the "
    "subsets fixed"
)


@dataclass(frozen=True)
class Network:
    """An extractor as figures name it; `published` if it is FID's own with its own weights."""

    name: str
    published: bool = False
    num_components: int | None = None  # principal components that the Frechet distance is taken in; None = all features

    def call(self, figure: str) -> str:
        """What reports call a figure in its features."""
        if self.published and figure in _PUBLISHED:
            return _PUBLISHED[figure]
        space = "" if self.num_components is None else f"-PCA{self.num_components}"
        names = {
            "frechet": f"FD-{self.name}{space}",
            "kernel": f"KD-{self.name}",
            "inception_score": f"IS-{self.name}",
        }
        return names.get(figure, f"{figure} ({self.name})")


_PUBLISHED = {"frechet": "FID", "kernel": "KID", "inception_score": "IS"}


def set_figures(
    made: FeatureSet, real: FeatureSet, network: Network, classifier: Tensor | None = None, resamples: int = 0
) -> dict[str, dict[str, Any]]:
    """The figures by name: `name` for people, `value`, and an `interval` if `resamples` halves are asked for.

    A figure that cannot be taken has `not_measured` with the reason in their place; `warning` says what a small number
    of images does to one that was.
    Shapes: classifier (classes, D) of Inception, whose logits are the features times it.
    Raises: ConfigError if the extractors differ; NumericsError if a feature is not finite.
    """
    require_one_extractor(made, real)
    require_finite(made.features, "samples")
    require_finite(real.features, "reference")
    halves = Halves(len(made), resamples)
    x, y = made.features.double(), real.features.double()
    figures = {"frechet": _frechet(x, y, network, halves), "kernel": _kernel(x, y, network, halves)}
    figures |= _neighbours(x, y, network, halves)
    if classifier is not None:
        figures["inception_score"] = score_figure(x @ classifier.double().T, network.call("inception_score"), halves)
    return {name: found | ({"num_images": len(x)} if "value" in found else {}) for name, found in figures.items()}


def with_interval(
    value: float,
    halves: Halves,
    least: int,
    over: Callable[[], Sequence[float]],
    bounds: tuple[float, float] = (-math.inf, math.inf),
    share_of: int | None = None,
) -> dict[str, Any]:
    """A value with its interval, or why it has none; `over` gives the figure's values over the halves.

    `least` is the number of samples that the figure needs, `bounds` are what it can be. `share_of` is for shares: at 0
    or 1, where halves may all agree, the interval is at least as wide as that of a share of so many images. Where
    halves of another figure all agree, there is none.
    """
    if not halves.resamples:
        return {"value": value, "interval": None}
    if halves.size < least:
        reason = f"halves of {halves.num_samples} samples have fewer than {least}"
        return {"value": value, "interval": None, "no_interval": reason}
    interval = halves.interval(value, over(), bounds)
    differs = interval["standard_error"] > _ROUNDING * abs(value)
    if share_of is not None and (value in (0.0, 1.0) or not differs):
        wilson = share_interval(value, share_of)
        interval["low"], interval["high"] = min(interval["low"], wilson["low"]), max(interval["high"], wilson["high"])
        interval["method"] += f", joined with {wilson['method']}"
    elif not differs:
        return {"value": value, "interval": None, "no_interval": ALL_EQUAL}
    return {"value": value, "interval": interval}


def too_few(num_made: int, num_real: int, least: int) -> str | None:
    """Why a figure cannot be taken."""
    for count, what in ((num_made, "samples"), (num_real, "reference images")):
        if count < least:
            return f"{count} {what}, at least {least} are needed"
    return None


def _frechet(x: Tensor, y: Tensor, network: Network, halves: Halves) -> dict[str, Any]:
    name, components = network.call("frechet"), network.num_components
    least = 2 if components is None else components + 1
    reason = too_few(len(x), len(y), least)
    if reason is not None:
        return {"name": name, "not_measured": reason}
    if components is not None:
        space = FeatureSpace.fit(y, components)
        x, y = space.project(x), space.project(y)
    reference = Gaussian.of(y)
    figure = with_interval(
        Gaussian.of(x).distance(reference),
        halves,
        least,
        lambda: [Gaussian.of(x[half]).distance(reference) for half in halves.indices()],
        (0.0, math.inf),
    )
    figure = {"name": name} | figure
    figure["floor"] = None if len(y) // 2 < least else Gaussian.of(y[::2]).distance(Gaussian.of(y[1::2]))
    dimensions = x.shape[1]
    if min(len(x), len(y)) <= dimensions:
        count, what = min((len(x), "samples"), (len(y), "reference images"))
        floor = "" if figure["floor"] is None else f" (halves of the reference are {figure['floor']:.4g} apart)"
        figure["warning"] = (
            f"{name}: {count} {what} in {dimensions} dimensions span {count - 1} of them alone, so the covariance is "
            f"singular and the distance too large, by sampling and not by the model{floor}; give more than "
            f"{dimensions}, and compare with figures of the same numbers only"
        )
    return figure


def _kernel(x: Tensor, y: Tensor, network: Network, halves: Halves) -> dict[str, Any]:
    name = network.call("kernel")
    reason = too_few(len(x), len(y), 2)
    if not fidelity.is_installed():
        reason = f"needs torch-fidelity: {fidelity.INSTALL}"
    if reason is not None:
        return {"name": name, "not_measured": reason}
    value = fidelity.kernel_distance(x, y)
    figure: dict[str, Any] = {"name": name, "value": value, "interval": None}
    if halves.resamples and len(x) < fidelity.LEAST_JUDGED:
        figure["no_interval"] = f"{len(x)} samples, at least {fidelity.LEAST_JUDGED} are needed"
    elif halves.resamples:
        error = fidelity.kernel_error(x, y)
        if error > _ROUNDING * (abs(value) + 1):  # the kernel is about 1
            figure["interval"] = interval_around(value, error, len(x) - 1, KERNEL_METHOD)
        else:
            figure["no_interval"] = (
                "all samples add the same to it, which does not tell how far other samples lie apart"
            )
    return figure | {"subset_size": fidelity.subset_size(len(x), len(y))}


def _neighbours(x: Tensor, y: Tensor, network: Network, halves: Halves) -> dict[str, dict[str, Any]]:
    names = {figure: network.call(figure) for figure in neighbours.NAMES}
    reason = too_few(len(x), len(y), neighbours.LEAST)
    if reason is not None:
        return {figure: {"name": name, "not_measured": reason} for figure, name in names.items()}
    parts = halves.indices() if halves.size >= neighbours.LEAST else []
    whole, *over = neighbours.neighbour_figures(x, y, [torch.arange(len(x)), *parts])
    figures = {}
    for figure, name in names.items():
        values = [row[figure] for row in over]
        is_share = figure != "density"
        found = with_interval(
            whole[figure],
            halves,
            neighbours.LEAST,
            lambda values=values: values,  # type: ignore[misc]
            (0.0, 1.0 if is_share else math.inf),
            min(len(x), len(y)) if is_share else None,
        )
        figures[figure] = {"name": name} | found
    # With the reference fixed it is a share of independent samples: exactly what Wilson's interval is of.
    if halves.resamples and halves.size >= neighbours.LEAST:
        figures["precision"] = {
            "name": names["precision"],
            "value": whole["precision"],
            "interval": share_interval(whole["precision"], len(x)),
        }
    return figures


def score_figure(logits: Tensor, name: str, halves: Halves) -> dict[str, Any]:
    """The Inception score, or why it cannot be taken. Shapes: logits (N, classes) without the classifier's bias."""
    if len(logits) < fidelity.LEAST_SCORED:
        return {"name": name, "not_measured": f"{len(logits)} samples, at least {fidelity.LEAST_SCORED} are needed"}
    value, deviation = fidelity.inception_score(logits)
    figure = with_interval(
        value,
        halves,
        fidelity.LEAST_SCORED,
        lambda: [fidelity.inception_score(logits[half])[0] for half in halves.indices()],
        (1.0, math.inf),
    )
    return {"name": name} | figure | {"split_deviation": deviation}
