"""Which pipeline of diffusers computes what a model of ours computes, and in which folders its parts lie.

A model of a kind for which diffusers has a pipeline is exported as that pipeline; if the pipeline decodes or tokenises
otherwise, it is refused with the part. A model of a kind for which it has none (classes, layouts, semantic maps,
several of them) is exported as its parts: UNet, autoencoder and scheduler are models of diffusers, what turns y into
the UNet's inputs has no class there and lies in conditioner/ under our names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from ldm_scale.config.schema import AutoencoderConfig, ConditioningConfig, TextConditioningConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import DiffusionArtifact
from ldm_scale.models.autoencoder import LatentStatistics

UNET_PREFIX, CONDITIONER_PREFIX = "unet.", "conditioner.text."
CONDITIONER = "conditioner"  # folder of tensors without a class in diffusers


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of diffusers, and what it calls its parts."""

    name: str
    autoencoder: str | None  # folder; None: it draws pixels
    text_encoder: str | None = None  # folder, with tokenizer/ beside it
    spatial: Literal["inpainting", "low_resolution"] | None = None  # what it concatenates to the latents
    scales: bool = True  # whether it divides latents by scaling_factor before it decodes them


PIPELINES = {
    pipeline.name: pipeline
    for pipeline in (
        Pipeline("StableDiffusionPipeline", "vae", "text_encoder"),
        Pipeline("StableDiffusionInpaintPipeline", "vae", "text_encoder", "inpainting"),
        Pipeline("LDMTextToImagePipeline", "vqvae", "bert"),
        Pipeline("LDMPipeline", "vqvae"),
        Pipeline("LDMSuperResolutionPipeline", "vqvae", spatial="low_resolution", scales=False),
        Pipeline("DDIMPipeline", None, scales=False),
        Pipeline("DDPMPipeline", None, scales=False),
    )
}


@dataclass(frozen=True)
class Layout:
    """The parts of an exported model; folders that are None are not there."""

    pipeline: Pipeline | None
    autoencoder: str | None
    text_encoder: str | None
    reason: str = ""  # why there is no pipeline

    @property
    def swaps_mask(self) -> bool:
        """Whether the UNet takes the mask before the masked image's latents, as Stable Diffusion does."""
        return self.pipeline is not None and self.pipeline.spatial == "inpainting"


def kinds_of(conditioning: ConditioningConfig) -> list[str]:
    """Names of the sections that the model is conditioned on."""
    return [field.name for field in fields(conditioning) if getattr(conditioning, field.name) is not None]


def layout_of(artifact: DiffusionArtifact) -> Layout:
    """Where the parts of the model lie in an export.

    Raises: CheckpointError if the pipeline of its kind computes something else, with the part.
    """
    conditioning, first = artifact.conditioning, artifact.autoencoder.config
    kinds = kinds_of(conditioning)
    text = conditioning.text
    if kinds in (["text"], ["frozen_text"]):
        is_clip = text is None or text.encoder == "clip"
        pipeline = PIPELINES["StableDiffusionPipeline" if is_clip else "LDMTextToImagePipeline"]
        _require(pipeline, text, first, artifact.autoencoder.statistics)
        return Layout(pipeline, pipeline.autoencoder, pipeline.text_encoder)
    if not kinds:
        pipeline = PIPELINES["DDIMPipeline" if first.kind == "identity" else "LDMPipeline"]
        _require(pipeline, None, first, artifact.autoencoder.statistics)
        return Layout(pipeline, pipeline.autoencoder, None)
    name, obstacles = _special_pipeline(artifact, kinds)
    reasons = list(obstacles)
    if not reasons:
        pipeline = PIPELINES[name]
        return Layout(pipeline, pipeline.autoencoder, pipeline.text_encoder)
    folder = {"identity": None, "kl": "vae", "vq": "vqvae"}[first.kind]
    encoder = None if text is None else "text_encoder" if text.encoder == "clip" else "bert"
    return Layout(None, folder, encoder, reasons[0])


def _special_pipeline(artifact: DiffusionArtifact, kinds: list[str]) -> tuple[str, Iterator[str]]:
    """A pipeline for such conditioning, and why it cannot be taken."""
    if kinds == ["low_resolution"]:
        name = "LDMSuperResolutionPipeline"
        return name, _against_super_resolution(name, artifact)
    text = artifact.conditioning.text
    if kinds in (["text", "inpainting"], ["frozen_text", "inpainting"]) and (text is None or text.encoder == "clip"):
        name = "StableDiffusionInpaintPipeline"
        return name, _against_inpainting(name, artifact)
    return "", iter([f"diffusers has no pipeline for a model conditioned on {' and '.join(kinds)}"])


def _against_super_resolution(name: str, artifact: DiffusionArtifact) -> Iterator[str]:
    section, first = artifact.conditioning.low_resolution, artifact.autoencoder
    assert section is not None, "the kind that was asked about"
    statistics, f = first.statistics, first.config.downsampling_factor
    if section.factor != f:
        yield f"{name} enlarges by the autoencoder's f={f}, this model by {section.factor}"
    if first.config.latent_channels != (first.config.latent_channels + 3) // 2:
        yield f"{name} takes half of the UNet's input channels for latents, this model {first.config.latent_channels}"
    if not statistics.channel_mean and (statistics.shift, statistics.scale) != (0.0, 1.0):
        yield f"{name} neither scales nor shifts latents, this model's autoencoder has a scale of {statistics.scale:g}"
    if artifact.diffusion.prediction in ("edm", "flow"):
        yield f"{name} would scale the small image with the latents, for diffusion.prediction=edm"


def _against_inpainting(name: str, artifact: DiffusionArtifact) -> Iterator[str]:
    first = artifact.autoencoder
    if first.config.kind != "kl":
        yield f"{name} decodes with an AutoencoderKL, this model's autoencoder is {first.config.kind}"
    if first.config.latent_channels != 4:
        yield f"{name} takes 4 channels of latents, this model has {first.config.latent_channels}"
    if first.statistics.shift != 0.0:
        yield f"{name} only scales latents, this model's are shifted by {first.statistics.shift:g}"
    section = artifact.conditioning.inpainting
    if section is not None and section.drop_probability > 0:
        yield f"{name} keeps the image in both branches of guidance, this model was trained to lead away from none"


def _require(
    pipeline: Pipeline, text: TextConditioningConfig | None, first: AutoencoderConfig, statistics: LatentStatistics
) -> None:
    """Nothing, if the pipeline can tokenise for and decode with the model's parts.

    Raises: CheckpointError for the part that it cannot use.
    """
    name = pipeline.name
    if pipeline.autoencoder is None and (statistics.shift, statistics.scale) != (0.0, 1.0):
        raise CheckpointError(
            f"latent_statistics.scale={statistics.scale}, shift={statistics.shift} of pixels: {name} draws pixels "
            "between -1 and 1 as they are; export with --to safetensors"
        )
    if statistics.shift != 0.0:
        raise CheckpointError(
            f"latent_statistics.shift={statistics.shift}: {name} only scales latents and would decode shifted ones "
            "wrongly; export with --to safetensors"
        )
    if name == "StableDiffusionPipeline" and first.kind == "vq":
        raise CheckpointError(
            f"autoencoder.kind=vq: {name} hands its decoder a generator, which VQModel does not take; export with --to "
            "safetensors, or the autoencoder alone"
        )
    if name != "LDMTextToImagePipeline" or text is None:
        return
    for key, found, fixed in (
        ("conditioning.text.max_tokens", text.max_tokens, 77),
        ("the autoencoder's f", first.downsampling_factor, 8),
    ):
        if found != fixed:
            raise CheckpointError(
                f"{key}={found}: {name}, the one pipeline with an LDMBertModel, fixes it at {fixed}; export with --to "
                "safetensors"
            )
