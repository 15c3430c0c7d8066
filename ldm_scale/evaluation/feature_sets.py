"""Features of a set of images with what they are of and what took them, in memory, as a file, and in a cache.

A cache entry is found by the hash of all that its features depend on: every image's bytes in their order, cropping,
resizing and decoder, the extractor and its weights. So nothing has to be invalidated, and two runs that miss at once
write the same. An entry is a feature file like any other. It appears whole, and its content's hash is checked when it
is read: one that is damaged is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.errors import ConfigError, DataError, NumericsError
from ldm_scale.interchange.safetensors_io import json_sha256, tensors_sha256
from ldm_scale.telemetry.log import get_logger

FORMAT, VERSION = "ldm-scale-features", "1"
EXTENSION = ".safetensors"


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features (N, D) fp32 in the order of the images, `extractor` that took them, `images` that they are of."""

    features: Tensor
    extractor: dict[str, Any]
    images: dict[str, Any]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def sha256(self) -> str:
        """Hash of the features and of what they are."""
        described = json_sha256({"extractor": self.extractor, "images": self.images})
        return hashlib.sha256((described + tensors_sha256({"features": self.features})).encode()).hexdigest()


def require_finite(features: Tensor, what: str) -> None:
    """Nothing, if all features are numbers.

    Raises: NumericsError with the first image that has others.
    """
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        raise NumericsError(
            f"{what}: features of {int((~finite).sum())} of {len(features)} images are not finite, the first of image "
            f"{int((~finite).nonzero()[0])} in the order of evaluation: these images are not, or their extractor's "
            "weights are damaged"
        )


def require_one_extractor(made: FeatureSet, real: FeatureSet) -> None:
    """Nothing, if one extractor took the features of both.

    Raises: ConfigError with the first field that differs.
    """
    for name in made.extractor | real.extractor:
        first, second = (features.extractor.get(name, "nothing") for features in (made, real))
        if first != second:
            raise ConfigError(
                f"features of the samples and of the reference come from different extractors: {name} is {first!r} and "
                f"{second!r}; distances between them mean nothing: take both with one"
            )
    if made.features.shape[1] != real.features.shape[1]:
        raise DataError(f"features of {made.features.shape[1]} and {real.features.shape[1]} numbers: a file is damaged")


def write_features(path: Path, features: FeatureSet) -> None:
    """Nothing; the file is there whole, or as it was.

    Raises: OSError.
    """
    from safetensors.torch import save

    content = save(
        {"features": features.features.contiguous()},
        metadata={
            "format": FORMAT,
            "version": VERSION,
            "extractor": json.dumps(features.extractor),
            "images": json.dumps(features.images),
            "sha256": features.sha256,
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


def read_features(path: Path) -> FeatureSet:
    """The features in a file.

    Raises: DataError if they are damaged or none.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise DataError(
                    f"{path}: not a feature file of `ldm-scale evaluate` (format {FORMAT}, version {VERSION})"
                )
            extractor, images = json.loads(metadata["extractor"]), json.loads(metadata["images"])
            found = FeatureSet(file.get_tensor("features"), extractor, images)
    except FileNotFoundError:
        raise DataError(f"{path}: no such feature file") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: this feature file cannot be read ({error}); take the features again") from None
    if found.features.ndim != 2 or metadata.get("sha256") != found.sha256:
        raise DataError(f"{path}: this feature file is damaged, its hash is another; take the features again")
    return found


class FeatureCache:
    """Feature files in a folder, by what they depend on. None as folder: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, wanted: Mapping[str, Any]) -> Path | None:
        """Where features of that description lie."""
        return None if self.folder is None else self.folder / f"{json_sha256(wanted)}{EXTENSION}"

    def get(self, wanted: Mapping[str, Any]) -> FeatureSet | None:
        """The features of that description, or None if they have to be taken; warns if there were some, damaged."""
        path = self.path(wanted)
        if path is None or not path.exists():
            return None
        try:
            found = read_features(path)
            if found.images.get("wanted") != json.loads(json.dumps(wanted)):
                raise DataError(f"{path}: holds other features than its name says")
        except DataError as error:
            get_logger().warning(f"cache: {error}")
            return None
        get_logger().info(f"features of {len(found)} reference images from {path}")
        return found

    def put(self, wanted: Mapping[str, Any], features: FeatureSet) -> None:
        """Nothing; the features are kept, or a warning says why not: the figures do not need the cache."""
        path = self.path(wanted)
        if path is None:
            return
        try:
            write_features(path, features)
        except OSError as error:
            get_logger().warning(f"cache: {path} cannot be written ({error.strerror}); the features are not kept")
            return
        get_logger().info(f"kept features of {len(features)} reference images in {path}")


def default_cache() -> Path:
    """Where features are kept unless somebody says otherwise: in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ldm-scale" / "features"
