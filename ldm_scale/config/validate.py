"""Rules that span several fields of a configuration, checked before any process group starts.

Types and closed choices are `convert.py`'s matter, bounds of single numbers `ranges.py`'s, the batch arithmetic of a
run's ranks `fit.py`'s. Here: shapes that must fit each other and what a stage cannot do without. The first breach is
raised, as one line with the key, the value, the rule and a fix that can be typed as an override. Nothing is rounded
or corrected in silence.
"""

from __future__ import annotations

from itertools import pairwise

from ldm_scale.config.fit import batch_plan, check_latent_resolution, neighbours
from ldm_scale.config.ranges import check_ranges
from ldm_scale.config.schema import AutoencoderConfig, Config, UNetConfig
from ldm_scale.errors import ConfigError

# OpenCLIP's tokenizer numbers its tokens up to 49407; a smaller table would be read past its end.
TOKENIZER_VOCABULARY = 49408
# The start and the end token and room for one word.
MIN_TOKENS = 3


def validate(config: Config, *, world_size: int) -> None:
    """Nothing, if a run of `world_size` ranks can train `config`.

    Raises: ConfigError on the first rule that is broken.
    """
    validate_architecture(config)
    _check_run(config)
    batch_plan(config, world_size)


def validate_architecture(config: Config) -> None:
    """Nothing, if the networks of `config` can be built and fit each other and the resolution.

    What `ldm-scale plan` and the export of untrained models need: no data, artifact or batch is looked at.

    Raises: ConfigError on the first rule that is broken.
    """
    check_ranges(config)
    _check_autoencoder(config)
    if config.stage == "diffusion":
        _check_unet(config.unet)
        check_latent_resolution(config, config.autoencoder.downsampling_factor, "the autoencoder")
        _check_text(config)
        _check_diffusion(config)


def _check_autoencoder(config: Config) -> None:
    autoencoder = config.autoencoder
    _check_levels("autoencoder", autoencoder)
    f, resolution = autoencoder.downsampling_factor, config.data.resolution
    if resolution % f:
        raise ConfigError(
            f"data.resolution={resolution} does not divide by the autoencoder's f={f} "
            f"({len(autoencoder.channel_multipliers)} levels); set data.resolution to a multiple of {f} "
            f"({neighbours(resolution, f)})"
        )
    loss = config.autoencoder_loss
    # Each of the strided layers halves the side, the two closing 4x4 convolutions take one pixel each.
    smallest = 3 * 2**loss.discriminator_layers
    if config.stage == "autoencoder" and loss.adversarial_weight > 0 and resolution < smallest:
        raise ConfigError(
            f"autoencoder_loss.discriminator_layers={loss.discriminator_layers} leaves nothing of data.resolution="
            f"{resolution}: it needs {smallest} pixels; set fewer layers, or autoencoder_loss.adversarial_weight=0"
        )


def _check_levels(section: str, network: AutoencoderConfig | UNetConfig) -> None:
    """Every GroupNorm of the network has whole groups; the first convolution's channels are a level of their own."""
    if not network.channel_multipliers:
        raise ConfigError(f"{section}.channel_multipliers=[]: must have at least one level; give [1,2,4], for example")
    for multiplier in (1, *network.channel_multipliers):
        channels = network.base_channels * multiplier
        if channels % network.norm_groups:
            raise ConfigError(
                f"{section}.norm_groups={network.norm_groups} does not divide the {channels} channels of a level "
                f"({section}.base_channels={network.base_channels} x {multiplier}); set {section}.norm_groups to a "
                f"divisor, or {section}.base_channels to {neighbours(network.base_channels, network.norm_groups)}"
            )


def _check_unet(unet: UNetConfig) -> None:
    _check_levels("unet", unet)
    if (unet.head_dim is None) == (unet.num_heads is None):
        raise ConfigError(
            f"unet.head_dim={_null(unet.head_dim)} and unet.num_heads={_null(unet.num_heads)}: exactly one must be "
            "set; set the other to null"
        )
    num_levels = len(unet.channel_multipliers)
    for level in unet.attention_levels:
        if not 0 <= level < num_levels:
            raise ConfigError(
                f"unet.attention_levels={list(unet.attention_levels)}: level {level} does not exist; the {num_levels} "
                f"levels are 0 (finest) to {num_levels - 1}"
            )
    if any(first >= second for first, second in pairwise(unet.attention_levels)):
        raise ConfigError(
            f"unet.attention_levels={list(unet.attention_levels)}: must rise, without repetition; write "
            f"{sorted(set(unet.attention_levels))}"
        )
    # The middle is as wide as the last level and always has attention.
    for level in sorted({*unet.attention_levels, num_levels - 1}):
        channels = unet.base_channels * unet.channel_multipliers[level]
        key, divisor = ("head_dim", unet.head_dim) if unet.head_dim else ("num_heads", unet.num_heads)
        assert divisor is not None, "one of the two is set"
        if channels % divisor:
            raise ConfigError(
                f"unet.{key}={divisor} does not divide the {channels} channels of level {level} (unet.base_channels="
                f"{unet.base_channels} x {unet.channel_multipliers[level]}); set unet.{key} to a divisor, such as "
                f"{_largest_divisor(channels, divisor)}"
            )


def _check_text(config: Config) -> None:
    text = config.conditioning
    if text.width % text.num_heads:
        raise ConfigError(
            f"conditioning.width={text.width} does not divide by conditioning.num_heads={text.num_heads}; set "
            f"conditioning.num_heads to a divisor, such as {_largest_divisor(text.width, text.num_heads)}"
        )
    if text.max_tokens < MIN_TOKENS:
        raise ConfigError(
            f"conditioning.max_tokens={text.max_tokens}: must be at least {MIN_TOKENS} (start, one word, end); "
            "CLIP has 77"
        )
    if text.vocab_size < TOKENIZER_VOCABULARY:
        raise ConfigError(
            f"conditioning.vocab_size={text.vocab_size}: the tokenizer numbers {TOKENIZER_VOCABULARY} tokens; set "
            f"conditioning.vocab_size={TOKENIZER_VOCABULARY}"
        )


def _check_diffusion(config: Config) -> None:
    diffusion = config.diffusion
    if diffusion.beta_start >= diffusion.beta_end:
        raise ConfigError(
            f"diffusion.beta_start={diffusion.beta_start} must be below diffusion.beta_end={diffusion.beta_end}: the "
            "noise grows with t; swap them"
        )
    if config.sampling.num_steps > diffusion.num_timesteps:
        raise ConfigError(
            f"sampling.num_steps={config.sampling.num_steps} exceeds diffusion.num_timesteps="
            f"{diffusion.num_timesteps}; set sampling.num_steps to at most {diffusion.num_timesteps}"
        )


def _check_run(config: Config) -> None:
    if not config.run_dir:
        raise ConfigError("run_dir='': a run needs a folder; choose experiment=NAME, or set run_dir=PATH")
    if not config.data.manifest:
        raise ConfigError(
            "data.manifest='': training needs a data set; set data.manifest=PATH to a manifest.json that "
            "`ldm-scale prepare` wrote"
        )
    if config.stage == "diffusion" and not config.artifact:
        raise ConfigError(
            "artifact='': stage=diffusion works in the latent space of a trained autoencoder; set artifact=FOLDER, "
            "such as runs/kl_f8/artifact"
        )
    if config.optimizer.warmup_images >= config.train.total_images:
        raise ConfigError(
            f"optimizer.warmup_images={config.optimizer.warmup_images} is not below train.total_images="
            f"{config.train.total_images}: the learning rate would never reach its peak; shorten the warm-up"
        )


def _largest_divisor(value: int, limit: int) -> int:
    return max(d for d in range(1, min(value, limit) + 1) if value % d == 0)


def _null(value: int | None) -> str:
    return "null" if value is None else str(value)
