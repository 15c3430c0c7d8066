"""From what a user asks for to pictures: the part of `LoadedDiffusion.sample` that is about options.

Sizes: a picture, map or small picture that is given says how large the sample is, unless the caller does; without any
it has the training resolution. Beyond that UNet and decoder are applied convolutionally (arXiv:2112.10752, section
4.3.2), whole, or with `tile` in windows, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditions, Inputs
from ldm_scale.conditioning.inpainting import compose_inpainted
from ldm_scale.conditioning.latent_diffusion import can_be_guided, sample_latents
from ldm_scale.conditioning.windows import WindowedUNet
from ldm_scale.config.fit import neighbours
from ldm_scale.config.schema import SamplingConfig
from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.diffusion.sampler import ImageNoise, Start
from ldm_scale.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from ldm_scale.interchange.load import LoadedDiffusion

MAX_WINDOWS = 8

_TEXT_KINDS = ("text", "frozen_text")


class SampleOptions(TypedDict, total=False):
    """What `LoadedDiffusion.sample` takes beside y and seeds; None, or absent, is the default."""

    # Fields of `SamplingConfig`; the default is the model's own.
    sampler: str | None
    num_steps: int | None
    eta: float | None
    guidance_scale: float | None
    guidance_rescale: float | None
    guidance_interval: tuple[float, float] | None
    # The picture's, in pixels.
    height: int | None
    width: int | None
    tile: int | None  # a side of the windows in which UNet and autoencoder work; None = all at once
    overlap: int | None  # of neighbouring windows; a quarter of the tile
    max_windows: int | None  # that the UNet is given at once
    # Other starts and goals.
    negative: str | None  # caption of the branch that guidance leads away from, in place of the empty one
    init_images: Tensor | None  # (B, 3, H, W) in [-1, 1] to start from in place of noise (arXiv:2108.01073)
    strength: float | None  # with init_images: share of the steps that are taken, up to 1 = from noise
    guide: Callable[[Denoiser], Denoiser] | None  # put around the denoiser, such as `classifier_guided`
    observe: Callable[[int, Tensor], None] | None  # told (steps done, clean latents that are predicted) in every step


def draw(
    model: LoadedDiffusion,
    y: Conditions,
    seeds: Sequence[int],
    progress: Callable[[int], None] | None,
    options: SampleOptions,
) -> Tensor:
    """See `LoadedDiffusion.sample`."""
    tile, overlap = options.get("tile"), options.get("overlap")
    unet = _windowed(model, tile, overlap, options.get("max_windows"))
    init_images = options.get("init_images")
    size = model.latent_size(*_picture_size(model, y, init_images, options.get("height"), options.get("width")))

    inputs = model.prepare(y, tile)
    for name, rows in inputs.items():
        if len(rows) != len(seeds):
            raise ConfigError(f"{len(rows)} rows of {name} and {len(seeds)} seeds: give one seed per image")
    sampling = chosen_sampling(model, options)
    z = sample_latents(
        model.network,
        model.process,
        inputs,
        ImageNoise(tuple(seeds), (model.autoencoder.config.latent_channels, *size), model.device),
        sampling,
        progress,
        null_inputs=_negative_inputs(model, inputs, options.get("negative"), sampling, len(seeds)),
        unet=unet,
        guide=options.get("guide"),
        observe=options.get("observe"),
        start=_start(model, init_images, options.get("strength"), size, len(seeds), tile),
    )
    if not z.isfinite().all():
        raise NumericsError("the sample is not finite: guide less (guidance_scale, a guide's scale), or use float32")
    pixels = model.autoencoder.decode(z, tile, overlap).float()
    if not pixels.isfinite().all():
        raise NumericsError(
            "the autoencoder's decoder gives pixels that are not finite for a latent that is: its weights are damaged, "
            "or too large for their type; use float32, or export or import the autoencoder again"
        )
    images = pixels.clamp(-1.0, 1.0)
    if model.conditioning.inpainting is None or y.images is None or y.masks is None:
        return images
    return compose_inpainted(images, y.images.to(images.device), y.masks)


def chosen_sampling(model: LoadedDiffusion, options: SampleOptions) -> SamplingConfig:
    """The model's defaults with what `options` say instead.

    Raises: ConfigError for guidance that has no second branch to lead away from, or options of guidance without it.
    """
    given = {name: options[name] for name in _OF_CONFIG if options.get(name) is not None}  # type: ignore[literal-required]
    sampling = replace(model.sampling, **given)
    if sampling.sampler != "ddim" and "eta" not in given:
        sampling = replace(sampling, eta=0.0)  # the model's default belongs to its own sampler
    if options.get("negative") is None and not can_be_guided(model.network):
        scale = given.get("guidance_scale", 1.0)
        if scale != 1.0:
            raise ConfigError(
                f"guidance_scale={scale:g}: the model was never trained without its conditioning (drop_probability 0, "
                "or none), so that there is nothing to lead away from; leave guidance out, or set it to 1"
            )
        sampling = replace(sampling, guidance_scale=1.0)  # the configuration's default is for models that can
    idle = [name for name in ("guidance_rescale", "guidance_interval") if given.get(name)]
    if idle and sampling.guidance_scale == 1.0:
        raise ConfigError(
            f"{' and '.join(idle)} with a guidance scale of 1, which is no guidance; set a scale, or leave it out"
        )
    return sampling


_OF_CONFIG = ("sampler", "num_steps", "eta", "guidance_scale", "guidance_rescale", "guidance_interval")


def _picture_size(
    model: LoadedDiffusion, y: Conditions, init_images: Tensor | None, height: int | None, width: int | None
) -> tuple[int, int]:
    """(H, W) in pixels: as asked for, or else as what is given has.

    Raises: ConfigError if a small image does not become as large.
    """
    config, found = model.conditioning, (model.resolution, model.resolution)
    if config.inpainting is not None and y.images is not None:
        found = (y.images.shape[-2], y.images.shape[-1])
    elif config.low_resolution is not None and y.low_resolution is not None:
        factor = config.low_resolution.factor
        found = (y.low_resolution.shape[-2] * factor, y.low_resolution.shape[-1] * factor)
        if (height or found[0], width or found[1]) != found:
            raise ConfigError(
                f"a sample of {height} x {width} pixels of a small image that the model enlarges to {found[0]} x "
                f"{found[1]} ({factor} times): leave the size out, or give a small image of another size"
            )
    elif init_images is not None:
        found = (init_images.shape[-2], init_images.shape[-1])
    elif config.semantic_map is not None and y.maps is not None:
        found = (y.maps.shape[-2], y.maps.shape[-1])
    return height or found[0], width or found[1]


def _windowed(
    model: LoadedDiffusion, tile: int | None, overlap: int | None, max_windows: int | None
) -> WindowedUNet | None:
    """The UNet in windows of `tile` pixels.

    Raises: ConfigError if the UNet cannot halve them, or the overlap is not latents' and smaller.
    """
    if tile is None:
        if overlap is not None or max_windows is not None:
            raise ConfigError("overlap and max_windows belong to tile: give a tile too, or none of them")
        return None
    f, multiple = model.autoencoder.config.downsampling_factor, model.side_multiple
    if tile < multiple or tile % multiple:
        raise ConfigError(
            f"tile={tile}: must be a multiple of {multiple} pixels (f={f} and the UNet's levels); take "
            f"{neighbours(tile, multiple)}"
        )
    if overlap is not None and (overlap < 0 or overlap >= tile or overlap % f):
        raise ConfigError(
            f"overlap={overlap}: must be 0 or a multiple of f={f} below tile={tile}; leave it out for a quarter of the "
            "tile"
        )
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows}: must be at least 1")
    in_latents = None if overlap is None else overlap // f
    return WindowedUNet(model.network.unet, tile // f, in_latents, max_windows or MAX_WINDOWS)


def _negative_inputs(
    model: LoadedDiffusion, inputs: Inputs, negative: str | None, sampling: SamplingConfig, num_images: int
) -> Inputs | None:
    """Inputs of the branch that guidance leads away from: the negative caption, all else as without one."""
    if negative is None:
        return None
    conditions = model.network.conditioner.conditions
    kinds = [name for name in _TEXT_KINDS if name in conditions]
    if not kinds:
        raise ConfigError("a negative prompt, but the model is not conditioned on text; leave it out")
    if sampling.guidance_scale == 1.0:
        raise ConfigError(
            "a negative prompt with a guidance scale of 1, which asks the prompt alone; set a scale above 1, or leave "
            "it out"
        )
    y, tools = Conditions(captions=[negative] * num_images), model.tools()
    return model.network.conditioner.null_inputs(inputs) | {name: conditions[name].prepare(y, tools) for name in kinds}


@torch.no_grad()
def _start(
    model: LoadedDiffusion,
    images: Tensor | None,
    strength: float | None,
    size: tuple[int, int],
    num_images: int,
    tile: int | None,
) -> Start | None:
    """The latents of the images to start from, and how far back."""
    if images is None:
        if strength is not None:
            raise ConfigError(f"strength={strength:g} without an image to start from: give one, or leave it out")
        return None
    if strength is None:
        raise ConfigError("an image to start from needs a strength above 0 (keep it) and at most 1 (noise alone)")
    z0 = model.encode_pixels(images, tile)
    if len(z0) != num_images or z0.shape[-2:] != size:
        raise ConfigError(
            f"images to start from of shape {tuple(images.shape)} for {num_images} samples with latents of {size[0]} x "
            f"{size[1]}: must be one each, of the sample's size; resize them"
        )
    return Start(z0, strength)
