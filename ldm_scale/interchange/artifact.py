"""Folders that carry a trained model from one command to the next: config.json and weights.safetensors.

    autoencoder artifact     config.json: architecture, latent statistics, pixel range, float16 probe, provenance
    diffusion artifact       config.json: UNet, text encoder, diffusion, sampling defaults, provenance
        autoencoder/         the autoencoder artifact that defines its latents, so that it samples on its own
        vocab.txt            of a text encoder that reads WordPieces

config.json holds the hash of the weights and, over everything else in it, the content hash by which others refer to
the artifact. Reading checks both: a changed weight, statistic or configuration is noticed. The hashes are over names,
shapes and values, not over file bytes, so copying or rewriting a folder keeps them. It costs one pass over the
weights (seconds for the largest).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.conditioning.tokenizers import copy_vocabulary
from ldm_scale.config.convert import config_to_dict, section_from_dict
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    DiffusionConfig,
    SamplingConfig,
    UNetConfig,
)
from ldm_scale.engine.lazy_tensors import LazyTensors, converted
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.content_checks import (
    AUTOENCODER_SECTIONS,
    DIFFUSION_SECTIONS,
    check_autoencoder,
    check_content,
    check_diffusion,
    check_sections,
)
from ldm_scale.interchange.output_folder import published_folder
from ldm_scale.interchange.safetensors_io import (
    describe_difference,
    json_sha256,
    read_json,
    read_tensors,
    tensors_sha256,
    write_json,
    write_tensors,
)
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics, without_training_parameters
from ldm_scale.models.half_precision import HalfPrecisionProbe

AUTOENCODER_FORMAT, DIFFUSION_FORMAT = "ldm-scale-autoencoder", "ldm-scale-diffusion"
VERSION = 1
CONFIG, WEIGHTS, AUTOENCODER_FOLDER = "config.json", "weights.safetensors", "autoencoder"
CONTENT_HASH = "content_sha256"
VOCABULARY = "vocab.txt"
DESCRIPTION = "ldm_scale.json"  # our description in folders whose layout is another program's
PIXEL_RANGE = [-1.0, 1.0]
HALF_PRECISION = "half_precision"


@dataclass(frozen=True, eq=False)
class Artifact:
    """A trained autoencoder and all that stage 2 must know of it.

    `content` is config.json without the content hash, kept as it was read: written again by a newer version it keeps
    its hash. Everything else is derived from it.
    """

    content: dict[str, Any]
    state: Mapping[str, Tensor] = field(repr=False)  # of `models.autoencoder.Autoencoder`; in files, as `LazyTensors`

    @cached_property
    def config(self) -> AutoencoderConfig:
        """Architecture."""
        return section_from_dict(AutoencoderConfig, self.content["autoencoder"], "autoencoder")

    @cached_property
    def statistics(self) -> LatentStatistics:
        """The map from raw latents to latents."""
        return section_from_dict(LatentStatistics, self.content["latent_statistics"], "latent_statistics")

    @cached_property
    def half_precision(self) -> HalfPrecisionProbe | None:
        """Whether float16 holds what it computes; None in artifacts that were never probed."""
        found = self.content.get(HALF_PRECISION)
        return None if found is None else section_from_dict(HalfPrecisionProbe, found, HALF_PRECISION)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights come from; `resolution` (pixels per side in training) is always there."""
        return self.content["provenance"]  # type: ignore[no-any-return]

    @cached_property
    def content_hash(self) -> str:
        """What other files refer to the artifact by."""
        return json_sha256(self.content)


@dataclass(frozen=True, eq=False)
class DiffusionArtifact:
    """A trained latent diffusion model with the autoencoder that it belongs to; `content` as in `Artifact`."""

    content: dict[str, Any]
    state: Mapping[str, Tensor] = field(repr=False)  # of `conditioning.latent_diffusion.LatentDiffusion`
    autoencoder: Artifact
    vocabulary: Path | None = None  # the folder's copy of the text encoder's vocabulary, where it needs one

    @cached_property
    def unet(self) -> UNetConfig:
        """Architecture of the denoiser."""
        return section_from_dict(UNetConfig, self.content["unet"], "unet")

    @cached_property
    def conditioning(self) -> ConditioningConfig:
        """Architecture of tau_theta."""
        config = section_from_dict(ConditioningConfig, self.content["conditioning"], "conditioning")
        if config.text is None or self.vocabulary is None:
            return config
        return replace(config, text=replace(config.text, vocabulary=str(self.vocabulary)))

    @cached_property
    def diffusion(self) -> DiffusionConfig:
        """Forward process and prediction type."""
        return section_from_dict(DiffusionConfig, self.content["diffusion"], "diffusion")

    @cached_property
    def sampling(self) -> SamplingConfig:
        """Defaults of sampling."""
        return section_from_dict(SamplingConfig, self.content["sampling"], "sampling")

    @property
    def provenance(self) -> dict[str, Any]:
        """As `Artifact.provenance`."""
        return self.content["provenance"]  # type: ignore[no-any-return]

    @cached_property
    def content_hash(self) -> str:
        """As `Artifact.content_hash`."""
        return json_sha256(self.content)


def make_artifact(
    state: Mapping[str, Tensor],
    config: AutoencoderConfig,
    statistics: LatentStatistics,
    provenance: Mapping[str, Any],
    half_precision: HalfPrecisionProbe | None = None,
) -> Artifact:
    """The artifact of an autoencoder, in memory; what only training needs of `state` is left out.

    Raises: CheckpointError if the tensors are not those of `config`, or the statistics no map.
    """
    assert "resolution" in provenance, "provenance says at which resolution the model was trained"
    with _naming("the autoencoder cannot be kept"):
        check_autoencoder(config, statistics)
    state = without_training_parameters(state)
    _require_tensors(expected_autoencoder_tensors(config), state, "the autoencoder's weights")
    content = {
        "format": AUTOENCODER_FORMAT,
        "version": VERSION,
        "autoencoder": config_to_dict(config),
        "latent_statistics": config_to_dict(statistics),
        "pixel_range": PIXEL_RANGE,
        "provenance": dict(provenance),
        "weights_sha256": tensors_sha256(state),
    }
    if half_precision is not None:
        content[HALF_PRECISION] = config_to_dict(half_precision)
    return Artifact(content, state)


def with_weights(content: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """An autoencoder artifact's content for these weights; what was probed on other weights is left out."""
    digest = tensors_sha256(state)
    stale = () if digest == content.get("weights_sha256") else (HALF_PRECISION,)
    return {key: value for key, value in content.items() if key not in stale} | {"weights_sha256": digest}


def make_diffusion_artifact(
    state: Mapping[str, Tensor],
    autoencoder: Artifact,
    *,
    unet: UNetConfig,
    conditioning: ConditioningConfig,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    provenance: Mapping[str, Any],
) -> DiffusionArtifact:
    """The artifact of a latent diffusion model, in memory.

    Raises: CheckpointError if the tensors are not those of the configuration.
    """
    assert "resolution" in provenance, "provenance says at which resolution the model was trained"
    with _naming("the diffusion model cannot be kept"):
        check_diffusion(unet, conditioning, diffusion, sampling)
    expected = expected_diffusion_tensors(unet, conditioning, autoencoder.config.latent_channels)
    _require_tensors(expected, state, "the diffusion model's weights")
    content = {
        "format": DIFFUSION_FORMAT,
        "version": VERSION,
        "unet": config_to_dict(unet),
        "conditioning": config_to_dict(conditioning),
        "diffusion": config_to_dict(diffusion),
        "sampling": config_to_dict(sampling),
        "autoencoder_sha256": autoencoder.content_hash,
        "provenance": dict(provenance),
        "weights_sha256": tensors_sha256(state),
    }
    return DiffusionArtifact(content, state, autoencoder)


def write_artifact(
    directory: Path,
    state: Mapping[str, Tensor],
    config: AutoencoderConfig,
    statistics: LatentStatistics,
    provenance: Mapping[str, Any],
    half_precision: HalfPrecisionProbe | None = None,
) -> str:
    """Content hash of the autoencoder artifact that `directory` holds from now on; an older one there is replaced.

    Raises: CheckpointError if the tensors are not those of `config`, or the directory holds something else.
    """
    artifact = make_artifact(state, config, statistics, provenance, half_precision)
    with published_folder(directory, may_replace=artifact_format) as folder:
        fill_artifact_folder(folder, artifact)
    return artifact.content_hash


def write_diffusion_artifact(directory: Path, artifact: DiffusionArtifact) -> str:
    """Content hash of the diffusion artifact that `directory` holds from now on; an older one there is replaced.

    Raises: CheckpointError if the directory holds something else.
    """
    with published_folder(directory, may_replace=artifact_format) as folder:
        fill_artifact_folder(folder, artifact)
    return artifact.content_hash


def fill_artifact_folder(folder: Path, artifact: Artifact | DiffusionArtifact) -> None:
    """Nothing; the empty `folder` holds the artifact's files."""
    write_tensors(folder / WEIGHTS, artifact.state)
    write_json(folder / CONFIG, artifact.content | {CONTENT_HASH: artifact.content_hash})
    if isinstance(artifact, DiffusionArtifact):
        (folder / AUTOENCODER_FOLDER).mkdir()
        fill_artifact_folder(folder / AUTOENCODER_FOLDER, artifact.autoencoder)
        text = artifact.conditioning.text
        if text is not None and text.vocabulary is not None:
            copy_vocabulary(text, folder / VOCABULARY)


def artifact_format(directory: Path) -> str | None:
    """AUTOENCODER_FORMAT or DIFFUSION_FORMAT; None if the folder is no artifact of ours."""
    if not (directory / CONFIG).is_file():
        return None
    found = read_json(directory / CONFIG).get("format")
    return found if found in (AUTOENCODER_FORMAT, DIFFUSION_FORMAT) else None


def read_artifact(directory: Path) -> Artifact:
    """The autoencoder artifact in `directory`.

    Raises: CheckpointError if it is incomplete, changed since it was written, or of another format or version.
    """
    artifact = Artifact(*_read_verified(directory, AUTOENCODER_FORMAT))
    check_autoencoder_content(artifact, directory)
    return artifact


def read_diffusion_artifact(directory: Path) -> DiffusionArtifact:
    """The diffusion artifact in `directory`, its autoencoder included.

    Raises: as `read_artifact`, and if the autoencoder is not the one that the model was trained on.
    """
    content, state = _read_verified(directory, DIFFUSION_FORMAT)
    vocabulary = directory / VOCABULARY if (directory / VOCABULARY).is_file() else None
    artifact = DiffusionArtifact(content, state, read_artifact(directory / AUTOENCODER_FOLDER), vocabulary)
    check_diffusion_content(artifact, directory)
    return artifact


def read_description(folder: Path) -> tuple[Artifact, DiffusionArtifact | None]:
    """What ldm_scale.json says of the autoencoder, and of the diffusion model if the folder holds one; no weights.

    Raises: CheckpointError that names the key if it cannot be.
    """
    path = folder / DESCRIPTION
    content = read_json(path)
    check_sections(content, ("autoencoder",), path)
    first = Artifact(content["autoencoder"], {})
    check_description(first, path)
    if "diffusion" not in content:
        return first, None
    check_sections(content, ("diffusion",), path)
    model = DiffusionArtifact(content["diffusion"], {}, first)
    check_description(model, path)
    return first, model


def check_autoencoder_content(artifact: Artifact, directory: Path) -> None:
    """Nothing, if the parts of the artifact from `directory` fit each other.

    Raises: CheckpointError that names the part.
    """
    check_description(artifact, directory / CONFIG)
    _require_tensors(expected_autoencoder_tensors(artifact.config), artifact.state, str(directory))


def check_diffusion_content(artifact: DiffusionArtifact, directory: Path) -> None:
    """As `check_autoencoder_content`."""
    trained_on, found = artifact.content.get("autoencoder_sha256"), artifact.autoencoder.content_hash
    if trained_on != found:
        raise CheckpointError(
            f"{directory}: the model was trained on the autoencoder {trained_on}, the one beside it is {found}; "
            "its latents would mean something else: export the model again"
        )
    check_description(artifact, directory / CONFIG)
    channels = artifact.autoencoder.config.latent_channels
    expected = expected_diffusion_tensors(artifact.unet, artifact.conditioning, channels)
    _require_tensors(expected, artifact.state, str(directory))


def check_description(artifact: Artifact | DiffusionArtifact, path: Path) -> None:
    """Nothing, if what the file at `path` says of the artifact can be: its weights are not looked at.

    Raises: CheckpointError that names the key.
    """
    is_autoencoder = isinstance(artifact, Artifact)
    expected = (AUTOENCODER_FORMAT if is_autoencoder else DIFFUSION_FORMAT, VERSION)
    if (found := (artifact.content.get("format"), artifact.content.get("version"))) != expected:
        raise CheckpointError(f"{path} has format and version {found}, expected {expected}; export the model again")
    check_content(artifact.content, AUTOENCODER_SECTIONS if is_autoencoder else DIFFUSION_SECTIONS, path)
    if is_autoencoder and artifact.content.get("pixel_range") != PIXEL_RANGE:
        raise CheckpointError(
            f"{path}: pixel_range is {artifact.content.get('pixel_range')}, this program's pixels are in "
            f"{PIXEL_RANGE}; use an artifact that was trained on that range"
        )
    with _naming(f"{path} cannot be used"):
        if isinstance(artifact, Artifact):
            check_autoencoder(artifact.config, artifact.statistics)
            _ = artifact.half_precision
        else:
            check_diffusion(artifact.unet, artifact.conditioning, artifact.diffusion, artifact.sampling)


def expected_autoencoder_tensors(config: AutoencoderConfig) -> dict[str, Tensor]:
    """State dict of the autoencoder of `config`, without memory behind it."""
    with torch.device("meta"):
        return Autoencoder(config).state_dict()


def expected_diffusion_tensors(
    unet: UNetConfig, conditioning: ConditioningConfig, latent_channels: int
) -> dict[str, Tensor]:
    """State dict of the latent diffusion model of those configurations, without memory behind it."""
    with torch.device("meta"):
        return LatentDiffusion(unet, conditioning, latent_channels).state_dict()


def _read_verified(directory: Path, expected_format: str) -> tuple[dict[str, Any], LazyTensors]:
    """config.json without its content hash, and the weights, both as they were written."""
    path = directory / CONFIG
    content = read_json(path)
    found = (content.get("format"), content.get("version"))
    if found != (expected_format, VERSION):
        inside = directory / AUTOENCODER_FOLDER
        hint = f": its autoencoder is {inside}" if found[0] == DIFFUSION_FORMAT and inside.is_dir() else ""
        raise CheckpointError(f"{path} has format and version {found}, expected {(expected_format, VERSION)}{hint}")
    written_hash = content.pop(CONTENT_HASH, None)
    if json_sha256(content) != written_hash:
        raise CheckpointError(
            f"{path} was changed after it was written: its content hash is {json_sha256(content)}, it says "
            f"{written_hash}; restore the file, or export the model again"
        )
    # Files may hold half precision to be small; the weights are what they hold, in single.
    state = converted(read_tensors(directory / WEIGHTS), lambda x: x.float() if x.is_floating_point() else x)
    weights_hash = tensors_sha256(state)
    if weights_hash != content.get("weights_sha256"):
        raise CheckpointError(
            f"{directory / WEIGHTS} is not what was written with {CONFIG}: its hash is {weights_hash}, expected "
            f"{content.get('weights_sha256')}; copy the folder again"
        )
    return content, state


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turns what is wrong inside a description into an error that says of what."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{what}: {error}") from error


def _require_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    difference = describe_difference(expected, found)
    if difference:
        raise CheckpointError(f"{what} does not fit the configuration: {difference}; give the two that belong together")
