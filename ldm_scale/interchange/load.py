"""Trained models as objects to call, from whatever this program has left of them on disk.

    load_autoencoder(path)    artifact | diffusion artifact | diffusers export | run folder | checkpoint
    load_diffusion(path)      diffusion artifact | diffusers export | run folder | checkpoint

`read_source` is what both and the export share: it turns each of these into an artifact in memory. A run folder
stands for its newest checkpoint, except that a finished stage-1 run stands for its artifact, whose latent statistics
the checkpoint does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion, sample_latents
from ldm_scale.conditioning.text import tokenize
from ldm_scale.config.convert import config_from_dict, config_to_dict
from ldm_scale.config.schema import AutoencoderConfig, SamplingConfig
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.diffusion.schedule import build_schedule
from ldm_scale.engine.checkpoint import EMA, MANIFEST, latest_checkpoint, read_full_tensors, read_manifest
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import (
    AUTOENCODER_FORMAT,
    DESCRIPTION,
    DIFFUSION_FORMAT,
    Artifact,
    DiffusionArtifact,
    artifact_format,
    make_artifact,
    make_diffusion_artifact,
    read_artifact,
    read_diffusion_artifact,
)
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from ldm_scale.models.blocks import place_biases
from ldm_scale.models.tiling import decode_raw_tiled, encode_moments_tiled
from ldm_scale.telemetry.log import get_logger

Weights = Literal["raw", "ema"]


class LoadedAutoencoder:
    """A trained autoencoder, without gradients."""

    def __init__(self, artifact: Artifact) -> None:
        with torch.device("meta"):
            self.network = Autoencoder(artifact.config)
        self.network.load_state_dict(artifact.state, assign=True)
        # As its activations are: otherwise every convolution turns its weights anew, each time.
        self.network.to(memory_format=torch.channels_last)
        place_biases(self.network, torch.device("cpu"))
        self.network.statistics = artifact.statistics
        self.network.eval().requires_grad_(False)
        self.content_hash = artifact.content_hash
        self.half_precision = artifact.half_precision

    @property
    def config(self) -> AutoencoderConfig:
        """Architecture."""
        return self.network.config

    @property
    def latent_statistics(self) -> LatentStatistics:
        """The map from raw latents to latents."""
        return self.network.statistics

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """This object, its weights moved.

        Raises: ConfigError if float16 is asked for and the artifact does not say that it is safe.
        """
        if dtype == torch.float16 and self.config.kind != "identity":
            self._require_half_precision()
        self.network.to(device=device, dtype=dtype)
        place_biases(self.network, torch.device(device))
        return self

    @torch.no_grad()
    def encode(
        self, x: Tensor, noise: Tensor | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Tensor:
        """As `Autoencoder.encode`; with `tile` in tiles of so many pixels a side, as `encode_moments_tiled`."""
        if tile is None:
            _require_no_overlap(overlap)
            return self.network.encode(x, noise)
        return self.network.latents(*encode_moments_tiled(self.network, x, tile, overlap), noise)

    @torch.no_grad()
    def decode(self, z: Tensor, tile: int | None = None, overlap: int | None = None) -> Tensor:
        """As `Autoencoder.decode`; with `tile` in tiles of so many pixels a side, as `decode_raw_tiled`."""
        if tile is None:
            _require_no_overlap(overlap)
            return self.network.decode(z)
        z_raw = self.latent_statistics.denormalize(z)
        weight = next(self.network.parameters(), z_raw)
        return decode_raw_tiled(self.network, z_raw.to(weight.dtype), tile, overlap)

    def _require_half_precision(self) -> None:
        probe = self.half_precision
        if probe is None:
            found = "it has never been probed"
        elif not probe.fp16_safe:
            found = f"{probe.module} reaches {probe.max_activation:.3g} (float16 ends at 65504)"
            if probe.fp16_difference is not None:
                found += f", and float16 differs by {probe.fp16_difference:.1e}"
        else:
            return
        raise ConfigError(
            f"float16 is not safe for the autoencoder {self.content_hash[:12]}: {found}; keep float32 or bfloat16"
        )


def _require_no_overlap(overlap: int | None) -> None:
    if overlap is not None:
        raise ConfigError(f"overlap={overlap} without tile: only tiles overlap; give a tile too, or neither")


class LoadedDiffusion:
    """A trained latent diffusion model with its autoencoder, without gradients."""

    def __init__(self, artifact: DiffusionArtifact) -> None:
        latent_channels = artifact.autoencoder.config.latent_channels
        with torch.device("meta"):
            self.network = LatentDiffusion(artifact.unet, artifact.conditioning, latent_channels)
        self.network.load_state_dict(artifact.state, assign=True)
        self.network.eval().requires_grad_(False)
        self.autoencoder = LoadedAutoencoder(artifact.autoencoder)
        self.schedule = build_schedule(artifact.diffusion)
        self.sampling: SamplingConfig = artifact.sampling
        self.resolution: int = artifact.provenance["resolution"]
        self.content_hash = artifact.content_hash

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.network.unet.conv_in.weight.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """This object, its weights moved; the autoencoder keeps float32: it runs once an image, the UNet every step."""
        self.network.to(device=device, dtype=dtype)
        self.autoencoder.to(device)
        return self

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Prediction (eps) for noised latents, in z's type.

        Shapes: z (B, c, h, w), t (B,), context (B, M, d_tau); returns (B, c, h, w).
        """
        dtype = self.network.unet.conv_in.weight.dtype
        return self.network.unet(z.to(dtype), t, context.to(dtype)).to(z.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_conditioning(self, captions: Sequence[str]) -> Tensor:
        """Context of captions. Shapes: returns (len(captions), M, d_tau)."""
        tokens = tokenize(captions, self.network.conditioner.config.max_tokens)
        return self.network.conditioner(tokens.to(self.device))  # type: ignore[no-any-return]

    def sample(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        sampler: Literal["ddim", "ddpm"] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """One image per caption, as one batch; image i depends on captions[i] and seeds[i] alone.

        What is None is taken from the model's own defaults; `progress(n)` is called after the n-th step.
        Shapes: returns (len(captions), 3, H, W) in [-1, 1], float32.
        Raises: ConfigError if the numbers of captions and seeds differ.
        """
        if len(captions) != len(seeds):
            raise ConfigError(f"{len(captions)} captions and {len(seeds)} seeds: give one seed per caption")
        defaults = self.sampling
        sampling = replace(
            defaults,
            sampler=sampler or defaults.sampler,
            num_steps=defaults.num_steps if num_steps is None else num_steps,
            eta=defaults.eta if eta is None else eta,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
        )
        side = self.resolution // self.autoencoder.config.downsampling_factor
        noise = ImageNoise(tuple(seeds), (self.autoencoder.config.latent_channels, side, side), self.device)
        tokens = tokenize(captions, self.network.conditioner.config.max_tokens).to(self.device)
        z = sample_latents(self.network, self.schedule, tokens, noise, sampling, progress)
        return self.autoencoder.decode(z).clamp(-1.0, 1.0)


def load_autoencoder(path: str | Path, weights: Weights | None = None) -> LoadedAutoencoder:
    """The autoencoder in a folder, on the CPU; of a diffusion model, the one that defines its latents.

    `weights` chooses where the folder holds both (checkpoints): "ema" the averaged, "raw" the trained ones, None the
    averaged ones if there are any.
    Raises: CheckpointError if there is none, or it is incomplete.
    """
    artifact = read_source(Path(path), weights)
    return LoadedAutoencoder(artifact if isinstance(artifact, Artifact) else artifact.autoencoder)


def load_diffusion(path: str | Path, weights: Weights | None = None) -> LoadedDiffusion:
    """The latent diffusion model in a folder, on the CPU. `weights` as in `load_autoencoder`.

    Raises: CheckpointError if there is none, or it is incomplete.
    """
    artifact = read_source(Path(path), weights)
    if isinstance(artifact, Artifact):
        raise CheckpointError(
            f"{path} holds an autoencoder, expected a diffusion model: give the folder of a stage-2 run"
        )
    return LoadedDiffusion(artifact)


def read_source(path: Path, weights: Weights | None = None) -> Artifact | DiffusionArtifact:
    """The artifact in, or made from, an artifact, an export, a run folder or a checkpoint; `weights` as above.

    Raises: CheckpointError if the folder is none of these, or incomplete.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: give an artifact, an export, a run folder or a checkpoint")
    found = artifact_format(path)
    if found == AUTOENCODER_FORMAT:
        return read_artifact(path)
    if found == DIFFUSION_FORMAT:
        return read_diffusion_artifact(path)
    if (path / DESCRIPTION).is_file():
        require_diffusers()
        # diffusers takes seconds to import, and only its own folders need it.
        from ldm_scale.interchange.diffusers import read_diffusers

        return read_diffusers(path)
    if (path / MANIFEST).is_file():
        return _read_checkpoint(path, weights)
    return _read_run(path, weights)


def require_diffusers() -> None:
    """Nothing, if the libraries behind the diffusers format are installed.

    Raises: ConfigError that says how to install them.
    """
    absent = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"the diffusers format needs {' and '.join(absent)}, which this environment lacks: "
            "pip install 'ldm-scale[interchange]'"
        )


def _read_run(run_dir: Path, weights: Weights | None) -> Artifact | DiffusionArtifact:
    artifact = run_dir / "artifact"
    if artifact_format(artifact) == AUTOENCODER_FORMAT:
        get_logger().info(f"reading {artifact}: the run is finished, its artifact has the weights it ended with")
        return read_artifact(artifact)
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{run_dir} holds no artifact, export or complete checkpoint: give the run_dir of a run that has saved one"
        )
    return _read_checkpoint(checkpoint, weights)


def _read_checkpoint(checkpoint: Path, weights: Weights | None) -> Artifact | DiffusionArtifact:
    manifest = read_manifest(checkpoint)
    config = config_from_dict(manifest["config"])
    model = "autoencoder" if config.stage == "autoencoder" else "diffusion"
    if weights is None:
        weights = "ema" if manifest["models"].get(model, {}).get("tensors", {}).get(EMA) else "raw"
    get_logger().info(f"reading the {weights} weights of {checkpoint}")
    provenance = {
        "images": manifest["images"],
        "weights": weights,
        "resolution": config.data.resolution,
        "config": config_to_dict(config),
    }
    if config.stage == "autoencoder":
        get_logger().warning(
            f"{checkpoint} has no latent statistics (they are measured when stage 1 ends): its latents are raw latents"
        )
        state = read_full_tensors(checkpoint, model, weights)
        return make_artifact(state, config.autoencoder, LatentStatistics(), provenance)
    if not Path(config.artifact).is_dir():
        raise CheckpointError(
            f"{checkpoint} was trained on the autoencoder artifact={config.artifact}, which is not there: put the "
            "folder back, or start from the directory that the path is relative to"
        )
    autoencoder = read_artifact(Path(config.artifact))
    saved_hash = manifest["state"].get("autoencoder_hash", "")
    if saved_hash != autoencoder.content_hash:
        raise CheckpointError(
            f"{checkpoint} was trained on the autoencoder {saved_hash[:12] or 'of an unknown hash'}, "
            f"artifact={config.artifact} is {autoencoder.content_hash[:12]}: the latents of one mean nothing to the "
            "other; put the old artifact back"
        )
    return make_diffusion_artifact(
        read_full_tensors(checkpoint, model, weights),
        autoencoder,
        unet=config.unet,
        conditioning=config.conditioning,
        diffusion=config.diffusion,
        sampling=config.sampling,
        provenance=provenance,
    )
