"""The models that are compared: those of the paper's Tables 13, 14 and 6, as published and narrowed for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import AutoencoderConfig, Config, UNetConfig
from ldm_scale.config.validate import validate_architecture
from ldm_scale.planning.flops import RunSize, measure_run

FACTORS = (1, 2, 4, 8, 16, 32)
# The paper names its pixel model of Table 6 and prints no architecture for it. This one is ours: the levels of Table
# 14's LDM-1, attention in the middle alone as in the LDM-4 beside it, as wide as gives that one's parameters.
PIXEL_INPAINTING = (
    "experiment=inpaint_ldm4",
    "autoencoder=identity_f1",
    "model=unconditional_ldm1",
    "unet.base_channels=176",
    "unet.norm_groups=16",
    "unet.attention_levels=[]",
    "unet.head_dim=null",
    "unet.num_heads=1",
)
INPAINTING = {
    "LDM-1": (1, PIXEL_INPAINTING),
    "LDM-4 KL": (4, ("experiment=inpaint_ldm4", "autoencoder=kl_f4")),
    "LDM-4 VQ": (4, ("experiment=inpaint_ldm4", "autoencoder=vq_f4")),
    "LDM-4 VQ, no attention": (4, ("experiment=inpaint_ldm4", "autoencoder=vq_f4_noattn")),
}
FAMILIES = {
    "imagenet": "class-conditional ImageNet (Table 13)",
    "celeba": "unconditional CelebA (Table 14)",
    "inpainting": "inpainting (Table 6)",
}


@dataclass(frozen=True)
class Scale:
    """How large what is measured is, and how often."""

    resolution: int  # pixels a side that are trained on; sampling is of these and of twice these
    narrowing: int  # the published widths, heads' widths and groups are divided by this
    batch: int  # images of an optimizer step, the same for every model
    sample_images: tuple[int, int]  # images sampled at once, at the resolution and at twice that
    ddim_steps: int  # steps that are timed; a sample's time is made of their mean and the decoder's
    pairs: bool  # each model takes turns with LDM-1 alone, because more do not fit beside each other


SCALES = {
    # The coarsest UNet halves its 4x4 latents twice, so f = 32 needs 128 px.
    "small": Scale(resolution=128, narrowing=8, batch=4, sample_images=(2, 1), ddim_steps=1, pairs=False),
    "full": Scale(resolution=256, narrowing=1, batch=112, sample_images=(16, 4), ddim_steps=5, pairs=True),
}


@dataclass(frozen=True)
class Model:
    """A model of the paper; `fits` is how many images the paper's own GPU took at once."""

    family: str
    name: str
    f: int
    config: Config  # as published, at 256 px
    fits: int

    @property
    def key(self) -> str:
        """Unique name."""
        return f"{self.family}/{self.name}"

    @property
    def paper_images(self) -> int:
        """Images that the published training takes."""
        return self.config.train.total_images

    @property
    def cacheable(self) -> bool:
        """Whether it trains on cached latents: not if something is made of the pictures themselves."""
        return not self.config.conditioning.needs_pictures

    @cached_property
    def published(self) -> Counted:
        """What the published network takes, at 256 px."""
        return count(self.config)

    def at(self, scale: Scale) -> Config:
        """What is measured at a scale; the artifact is the caller's."""
        by = scale.narrowing
        config = self.config
        classes = config.conditioning.classes
        if classes is not None:
            classes = replace(classes, width=classes.width // by)
        micro = max(n for n in range(1, min(self.fits, scale.batch) + 1) if scale.batch % n == 0)
        config = replace(
            config,
            autoencoder=narrow_autoencoder(config.autoencoder, by),
            unet=narrow_unet(config.unet, by),
            conditioning=replace(config.conditioning, classes=classes),
            data=replace(config.data, resolution=scale.resolution),
            train=replace(config.train, global_batch=scale.batch, micro_batch=micro),
        )
        validate_architecture(config)
        return config


@dataclass(frozen=True)
class Counted:
    """FLOPs of one image; a multiply-add is two."""

    size: RunSize
    encodes: int  # runs of the encoder in a training step, where no latents are cached

    @property
    def parameters(self) -> int:
        """Of what is trained."""
        return self.size.trained.parameters

    @property
    def train_cached(self) -> int:
        """Of a training step whose latents are cached: three times the forward pass."""
        return self.size.step_flops

    @property
    def train_on_the_fly(self) -> int:
        """Of a training step that encodes its images."""
        return self.size.step_flops + self.encodes * self.size.encoder.forward_flops

    def sample(self, num_steps: int) -> int:
        """Of a sample without guidance, decoded."""
        assert self.size.unet is not None, "every model here has a UNet"
        return num_steps * self.size.unet.forward_flops + self.size.decoder.forward_flops


def count(config: Config) -> Counted:
    """FLOPs of a configuration at its resolution."""
    return Counted(measure_run(config), encodes=2 if config.conditioning.inpainting is not None else 1)


def models(families: Sequence[str] = tuple(FAMILIES)) -> list[Model]:
    """All of these families, LDM-1 first in each."""
    found = []
    for family in families:
        if family == "inpainting":
            for name, (f, overrides) in INPAINTING.items():
                # 128 images on eight GPUs are 16 on each. LDM-1's batch is not published: that of Table 13 is taken.
                found.append(Model(family, name, f, load_config(overrides), 7 if f == 1 else 16))
            continue
        for f in FACTORS:
            config = load_config([f"experiment={family}_ldm{f}"])
            found.append(Model(family, f"LDM-{f}", f, config, config.train.global_batch))
    return found


def narrow_unet(config: UNetConfig, by: int) -> UNetConfig:
    """The same levels, blocks, heads and channels a group, each level `by` times narrower."""
    head_dim = None if config.head_dim is None else config.head_dim // by
    return replace(
        config,
        base_channels=config.base_channels // by,
        norm_groups=max(1, config.norm_groups // by),
        head_dim=head_dim,
    )


def narrow_autoencoder(config: AutoencoderConfig, by: int) -> AutoencoderConfig:
    """As `narrow_unet`; a codebook has as many fewer codes as convolutions have products."""
    if config.kind == "identity":
        return config
    codes = None if config.codebook_size is None else config.codebook_size // by**2
    return replace(
        config,
        base_channels=config.base_channels // by,
        norm_groups=max(1, config.norm_groups // by),
        codebook_size=codes,
    )
