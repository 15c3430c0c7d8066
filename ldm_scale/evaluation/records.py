"""Every figure of a result as a record of its own: the value with all that it depends on, to be kept alone.

A table of records from many results can be sorted and filtered; whether two of them may be compared is a matter of
their protocols, whose hash each carries: `ldm-scale evaluate compare` of the results says which field differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import PIL

from ldm_scale import __version__
from ldm_scale.evaluation.intervals import share_interval
from ldm_scale.interchange.safetensors_io import json_sha256

_NORMAL = 1.959963984540054  # two-sided 95% of the normal distribution
_MEAN_METHOD = "normal approximation, from the deviation of the images' own figures"
_SAMPLING = ("sampler", "num_steps", "eta", "guidance_scale", "guidance_rescale", "guidance_interval")
_EXTRACTING = ("perceptual", "frechet", "samples")  # groups of figures with a part of the protocol of their own


def versions() -> dict[str, str | None]:
    """Versions of the programs that figures are made with; None of those that are not installed."""
    found: dict[str, str | None] = {"ldm-scale": __version__, "pillow": PIL.__version__}
    for name in ("torch", "torch-fidelity", "open_clip_torch", "scipy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def figure_records(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of a result document, each with its protocol.

    `weights` is the EMA profile, or raw; what is not known of other people's images is None.
    """
    model, protocol = document["model"], document["protocol"]
    sampling = model.get("sampling") or {}
    common = {
        "source": model["path"],
        "content_sha256": model["content_sha256"],
        "weights": model["weights"],
        **{name: sampling.get(name) for name in _SAMPLING},
        "data_sha256": protocol["data"]["pixels_digest"],
        "protocol_sha256": json_sha256(protocol),
        "command": document["command"],
        "versions": document["versions"],
    }
    return [
        {"figure": name, **found, **_extraction(name, protocol), **common}
        for name, found in _figures(
            {key: value for key, value in document["figures"].items() if key != COUNTS},
            protocol["data"]["num_images"],
            document["figures"].get(COUNTS, {}),
        )
    ]


def _figures(
    figures: dict[str, Any], num_images: int, counts: dict[str, int], prefix: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted name and value, interval and number of images of every figure that was measured.

    `counts` are numbers of images by dotted name, of means that may be over fewer.
    """
    for name, found in figures.items():
        path = f"{prefix}{name}"
        if isinstance(found, dict):
            count = counts[path] if path in counts else found.get("num_images", num_images)
            if "value" in found:
                yield path, {"name": found["name"], "value": found["value"], "interval": found["interval"], "n": count}
            elif found.get("distance") is not None:
                interval = found.get("interval")
                yield path, {"name": found["name"], "value": found["distance"], "interval": interval, "n": count}
            elif found.get("mean") is not None:
                yield path, _mean(path, found, count)
            yield from _figures(
                {key: value for key, value in found.items() if key not in _NO_FIGURES}, count, counts, f"{path}."
            )
        elif isinstance(found, int | float) and not isinstance(found, bool) and name not in _COUNTS:
            yield path, {"name": path, "value": found, "interval": None, "n": counts.get(path, num_images)}


COUNTS = "counts"  # group of figures: of how many images the means are
_NO_FIGURES = ("value", "distance", "interval", "mean", "std", "name", "level", "subset_size")
_COUNTS = ("num_images", "num_objects", "num_labels", "num_chosen", "explained_variance")


def _mean(path: str, found: dict[str, Any], count: int) -> dict[str, Any]:
    """The record of a mean over images; one whose images all have the same figure has no interval, of shares aside."""
    error = found["std"] / math.sqrt(count - 1) if count > 1 else None
    interval = None
    if found.get("share"):
        interval = share_interval(found["mean"], count)
    elif error:
        interval = {
            "level": 0.95,
            "low": found["mean"] - _NORMAL * error,
            "high": found["mean"] + _NORMAL * error,
            "standard_error": error,
            "method": _MEAN_METHOD,
        }
    return {"name": found.get("name", path), "value": found["mean"], "interval": interval, "n": count}


def _extraction(name: str, protocol: dict[str, Any]) -> dict[str, Any]:
    """What took the features that a figure is of, and the reference that it is set beside."""
    group = name.partition(".")[0]
    part = protocol.get(group, {}) if group in _EXTRACTING else {}
    if name.startswith("samples."):
        clip = part["clip"] if name.startswith("samples.clip_score") else None
        part = (clip or part["extractor"]) | {"reference": part["reference"]}
    reference = part.get("reference")
    return {
        "extractor": part.get("features", part.get("net")),
        "extractor_sha256": part.get("weights_sha256"),
        "resizer": part.get("resize"),
        "reference": protocol["data"]["pixels_digest"] if reference is None else reference["pixels_digest"],
        "n_reference": protocol["data"]["num_images"] if reference is None else reference["num_images"],
    }
