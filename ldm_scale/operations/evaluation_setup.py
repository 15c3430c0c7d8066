"""What the evaluations of both stages share: device, features for Frechet distances, and parts of their documents."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_scale.data.policy import BadSampleLog
from ldm_scale.engine import collectives, env
from ldm_scale.engine.tensor_file import require_place
from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.blocks import MeasuredImages
from ldm_scale.evaluation.features import FEATURE_RESOLUTION, NUM_COMPONENTS, EfficientNetFeatures, ImageFeatures
from ldm_scale.evaluation.frechet import frechet_protocol
from ldm_scale.evaluation.inception import NUM_FEATURES, InceptionFeatures
from ldm_scale.evaluation.parts import PartFolder
from ldm_scale.evaluation.records import figure_records, versions
from ldm_scale.evaluation.results import RESULT_FILE
from ldm_scale.evaluation.set_figures import Network
from ldm_scale.redaction import public_urls
from ldm_scale.telemetry.log import shows_progress

EFFICIENTNET_FEATURES = 1280
MEASUREMENT = "measurement_sha256"  # of a document: the hash of all that its measurement depends on


class FrechetSpace(NamedTuple):
    """Features and what a distance of reconstructions in them is called."""

    name: str
    features: ImageFeatures
    num_features: int
    num_components: int | None  # None = all features
    network: Network
    classifier: Tensor | None = None  # whose logits are the features times it

    @property
    def description(self) -> dict[str, Any]:
        """What took the features, as it stands beside them in files."""
        return {"network": self.network.name, **self.features.protocol, "weights_sha256": self.features.weights_hash}

    def protocol(self, num_images: int) -> dict[str, Any]:
        """What a distance over so many images depends on."""
        return {
            "name": self.name,
            **self.features.protocol,
            "weights_sha256": self.features.weights_hash,
            **frechet_protocol(num_images, self.num_features, self.num_components),
        }


def check_request(arguments: argparse.Namespace, picture: str = "") -> None:
    """Nothing, if --batch and --out can be used.

    Raises: ConfigError.
    """
    check_batch(arguments)
    out: Path | None = arguments.out
    if out is None:
        return
    if out.exists() and not out.is_dir():
        files = f"{RESULT_FILE} and {picture}" if picture else RESULT_FILE
        raise ConfigError(f"--out {out} is a file; give a folder for {files}")
    if (out / RESULT_FILE).exists() and not arguments.overwrite:
        raise ConfigError(f"--out {out} holds a {RESULT_FILE} already; give another folder, or --overwrite")
    if collectives.rank() == 0:  # which alone writes there, and may alone see it
        require_place(out, f"--out {out}")


def check_batch(arguments: argparse.Namespace) -> None:
    """Nothing, if --batch can be used.

    Raises: ConfigError.
    """
    if arguments.batch < 1:
        raise ConfigError(f"--batch {arguments.batch}: must be at least 1")


def complete(document: dict[str, Any], arguments: argparse.Namespace, kept: PartFolder) -> dict[str, Any]:
    """The document with command, versions, and each figure as a record of its own."""
    document = document | {"command": public_urls(arguments.command), "versions": versions(), MEASUREMENT: kept.key}
    return document | {"records": figure_records(document)}


def measured_before(arguments: argparse.Namespace, kept: PartFolder) -> dict[str, Any] | None:
    """The document of this very measurement in --out, if there is one; None on ranks other than 0."""
    if arguments.out is None or collectives.rank() != 0:
        return None
    try:
        document: dict[str, Any] = json.loads((arguments.out / RESULT_FILE).read_text(encoding="utf-8"))
        return document if document[MEASUREMENT] == kept.key and document["records"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def choose_device(name: str) -> torch.device:
    """This rank's device for --device.

    Raises: ConfigError if there is none such.
    """
    launch = env.read_launch()
    device = env.choose_device(name, launch, "--device ")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # By default cuDNN's convolutions of fp32 numbers round to 10 bits: other figures than a CPU's.
        torch.backends.cudnn.allow_tf32 = False
    return device


def open_features(arguments: argparse.Namespace, resolution: int, device: torch.device) -> FrechetSpace:
    """The features of --features and --features-weights for images of so many pixels.

    Raises: ConfigError if they are not there, or do not go together.
    """
    if arguments.features == "inception_v3":
        inception = InceptionFeatures(arguments.features_weights, device)
        network = Network(inception.network, published=inception.is_published)
        return FrechetSpace(inception.name, inception, NUM_FEATURES, None, network, inception.classifier)
    if arguments.features_weights is not None:
        raise ConfigError(
            f"--features-weights {arguments.features_weights}: efficientnet_lite0 brings its own; leave it out, or add "
            "--features inception_v3"
        )
    features = EfficientNetFeatures(device, resolution=max(resolution, FEATURE_RESOLUTION))
    network = Network("EffNetLite0", num_components=NUM_COMPONENTS)
    return FrechetSpace(network.call("frechet"), features, EFFICIENTNET_FEATURES, NUM_COMPONENTS, network)


def kept_parts(
    arguments: argparse.Namespace, what: Mapping[str, Any], space: FrechetSpace, device: torch.device
) -> PartFolder:
    """Where parts of this measurement are kept until its result is written; `what` is all else that they depend on."""
    return PartFolder(
        arguments.out,
        {
            "action": arguments.action,
            "batch": arguments.batch,
            "extractor": space.description,
            "device": device.type,
            "versions": versions(),
            **what,
        },
    )


def progress_bar(stream: MeasuredImages[Any], what: str, unit: str = "images", each: int = 1) -> tqdm[Any]:
    """A bar of all images of a stream, each of which counts for `each`."""
    return tqdm(
        total=stream.wanted * each,
        desc=what,
        unit=unit,
        mininterval=1.0,
        file=sys.stderr,
        disable=not shows_progress(),
    )


def describe_bad(bad: BadSampleLog) -> dict[str, Any]:
    """What was left out, for a document."""
    return {"count": bad.counts.total(), "reasons": dict(bad.counts), "names": bad.names}


def describe_machine(
    device: torch.device, stream: MeasuredImages[Any], seconds: float, **speeds: float
) -> dict[str, Any]:
    """Where it ran and how fast, for a document; of what was measured in these seconds, if anything was."""
    measured = stream.num_images - stream.num_kept
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "images_per_s": measured / seconds if measured else None,
        **speeds,
    }
