"""Trained models as objects to call, from whatever this program has left of them on disk.

    load_autoencoder(path)    artifact | diffusion artifact | diffusers folder | CompVis export | run | checkpoint
    load_diffusion(path)      diffusion artifact | diffusers folder | CompVis export | run | checkpoint

`sources.read_source` is what both and the export share: it turns each of these into an artifact in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, Unpack, cast

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioned, Conditions, Inputs, Tools
from ldm_scale.conditioning.frozen_text import FrozenTextCondition, FrozenTextEncoder
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion, in_type, with_spatial
from ldm_scale.conditioning.text import num_truncated
from ldm_scale.config.fit import neighbours
from ldm_scale.config.schema import AutoencoderConfig, ConditioningConfig, SamplingConfig
from ldm_scale.diffusion.process import build_process
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import (
    Artifact,
    DiffusionArtifact,
)
from ldm_scale.interchange.sampling import SampleOptions, draw
from ldm_scale.interchange.sources import Weights as Weights  # with `read_source`, what callers say here
from ldm_scale.interchange.sources import read_source as read_source
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from ldm_scale.models.blocks import place_biases
from ldm_scale.models.tiling import decode_raw_tiled, encode_moments_tiled


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


def _conditions(y: Conditions | Sequence[str]) -> Conditions:
    return y if isinstance(y, Conditions) else Conditions(captions=list(y))


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
        self.conditioning: ConditioningConfig = artifact.conditioning
        self.process = build_process(artifact.diffusion)
        self.sampling: SamplingConfig = artifact.sampling
        self.resolution: int = artifact.provenance["resolution"]
        self.labels: dict[str, list[str]] = artifact.provenance.get("labels", {})
        self.content_hash = artifact.content_hash
        self._text_encoder: FrozenTextEncoder | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.network.unet.conv_in.weight.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """This object, its weights moved; the autoencoder keeps float32: it runs once an image, the UNet every step."""
        self.network.to(device=device, dtype=dtype)
        self.autoencoder.to(device)
        self.process = self.process.to(device)
        if self._text_encoder is not None:
            self._text_encoder.to(device)
        return self

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, conditioned: Conditioned | Tensor | None = None) -> Tensor:
        """The network's output for noised latents, in z's type; `process` says what it predicts.

        Shapes: z (B, c, h, w), t (B,) times of the process, conditioned as `encode_conditioning` gives it, or a context
        (B, M, d_tau); returns (B, c, h, w).
        """
        dtype = self.network.unet.conv_in.weight.dtype
        if not isinstance(conditioned, Conditioned):
            conditioned = Conditioned(conditioned, None)
        context = None if conditioned.context is None else conditioned.context.to(dtype)
        x = with_spatial(self.process.network_input(z, t).to(dtype), conditioned)
        return self.network.unet(x, self.process.network_time(t), context).to(z.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def prepare(self, y: Conditions | Sequence[str], tile: int | None = None) -> Inputs:
        """What the networks of tau_theta take, of y or of captions alone; `tile` as of `LoadedAutoencoder.encode`.

        Raises: ConfigError if the model is conditioned on something that y lacks.
        """
        tools = self.tools(tile)
        if self.conditioning.frozen_text is not None:
            condition = cast(FrozenTextCondition, self.network.conditioner["frozen_text"])
            if not condition.has_null:
                condition.set_null(self._encode_text([""]))
        return self.network.conditioner.prepare(_conditions(y), tools)

    def tools(self, tile: int | None = None) -> Tools:
        """The frozen networks for `Condition.prepare`; pictures are encoded in tiles of so many pixels a side."""
        return Tools(self.device, encode=lambda x: self.encode_pixels(x, tile), encode_text=self._encode_text)

    def encode_pixels(self, x: Tensor, tile: int | None = None) -> Tensor:
        """Latents of pixels from anywhere: modes of the posterior. Shapes: (B, 3, H, W) to (B, c, H/f, W/f)."""
        return self.autoencoder.encode(x.to(self.device), tile=tile)

    @property
    def num_truncated(self) -> int:
        """Captions and layouts that `prepare` had to cut so far."""
        return num_truncated(*self.network.conditioner.conditions.values(), self._text_encoder)

    @torch.no_grad()
    def encode_conditioning(
        self, y: Conditions | Sequence[str], size: tuple[int, int] | None = None
    ) -> Conditioned | Tensor:
        """Context (B, M, d_tau) of y, with the spatial conditioning where the model has any.

        That is for latents of `size` (h, w); None is that of the training resolution.
        """
        inputs = in_type(self.prepare(y), self.network.unet.conv_in.weight.dtype)
        conditioned: Conditioned = self.network.conditioner(inputs, size or self.latent_size())
        only_context = conditioned.spatial is None and conditioned.context is not None
        return conditioned.context if only_context else conditioned  # type: ignore[return-value]

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(h, w) of the latents of such an image; None: the training resolution.

        Raises: ConfigError if the UNet cannot halve them as often as it has to.
        """
        sides = (self.resolution if height is None else height, self.resolution if width is None else width)
        f, multiple = self.autoencoder.config.downsampling_factor, self.side_multiple
        for side in sides:
            if side < multiple or side % multiple:
                raise ConfigError(
                    f"an image of {sides[0]} x {sides[1]} pixels: both sides must be multiples of {multiple} (f={f} "
                    f"and the UNet's levels); take {neighbours(side, multiple)} for {side}"
                )
        return (sides[0] // f, sides[1] // f)

    @property
    def side_multiple(self) -> int:
        """What the sides of pictures are multiples of, in pixels."""
        levels = len(self.network.unet.config.channel_multipliers)
        return self.autoencoder.config.downsampling_factor * int(2 ** (levels - 1))

    def sample(
        self,
        y: Conditions | Sequence[str],
        seeds: Sequence[int],
        *,
        progress: Callable[[int], None] | None = None,
        **options: Unpack[SampleOptions],
    ) -> Tensor:
        """One image per row of y (or caption), as one batch; image i depends on its row and seeds[i] alone.

        `progress(n)` is called after the n-th step. With conditioning.inpainting known pixels come back as they were.
        Shapes: returns (len(seeds), 3, H, W) in [-1, 1], float32.
        Raises: ConfigError if rows and seeds differ in number, or an option cannot be used; NumericsError if the result
        is not finite.
        """
        return draw(self, _conditions(y), seeds, progress, options)

    def _encode_text(self, captions: Sequence[str]) -> Tensor:
        """The frozen encoder's context; it is opened on first use."""
        if self._text_encoder is None:
            section = self.conditioning.frozen_text
            assert section is not None, "only a model with conditioning.frozen_text asks for it"
            self._text_encoder = FrozenTextEncoder(section).to(self.device)
        return self._text_encoder(captions)  # type: ignore[no-any-return]


def load_autoencoder(path: str | Path, weights: Weights | None = None) -> LoadedAutoencoder:
    """The autoencoder in a folder, on the CPU; of a diffusion model, the one that defines its latents.

    `weights` chooses where the folder holds several (checkpoints): "raw" the trained ones, "ema" their exponential
    average, "ema=0.05" the average of a power-function profile, reconstructed from the run's snapshots if nobody kept
    it; None the first average that the checkpoint holds, or the trained ones.
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
