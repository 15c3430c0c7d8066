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
from ldm_scale.config.schema import AutoencoderConfig, BatchPlan, Config, UNetConfig
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
    plan = batch_plan(config, world_size)
    if config.stage == "autoencoder":
        _check_discriminator_norm(config, plan, world_size)


def validate_architecture(config: Config) -> None:
    """Nothing, if the networks of `config` can be built and fit each other and the resolution.

    What `ldm-scale plan` and the export of untrained models need: no data, artifact or batch is looked at.

    Raises: ConfigError on the first rule that is broken.
    """
    check_ranges(config)
    _check_autoencoder(config)
    if config.stage == "autoencoder":
        _check_latents(config)
        _check_codebook_losses(config)
        _check_adversarial_loss(config)
    if config.stage == "diffusion":
        _check_unet(config.unet)
        check_latent_resolution(config, config.autoencoder.downsampling_factor, "the autoencoder")
        _check_text(config)
        _check_diffusion(config)


def _check_autoencoder(config: Config) -> None:
    autoencoder = config.autoencoder
    _check_levels("autoencoder", autoencoder)
    _check_attention_levels("autoencoder", autoencoder)
    _check_kind(autoencoder)
    f, resolution = autoencoder.downsampling_factor, config.data.resolution
    if resolution % f:
        raise ConfigError(
            f"data.resolution={resolution} does not divide by the autoencoder's f={f} "
            f"({len(autoencoder.channel_multipliers)} levels); set data.resolution to a multiple of {f} "
            f"({neighbours(resolution, f)})"
        )


def _check_kind(autoencoder: AutoencoderConfig) -> None:
    """The kind's own fields: a codebook for vq alone; the identity's latents are the pixels."""
    if autoencoder.kind == "vq" and autoencoder.codebook_size is None:
        raise ConfigError(
            "autoencoder.codebook_size=null: autoencoder.kind=vq needs the number of its codes; set "
            "autoencoder.codebook_size=8192, for example"
        )
    if autoencoder.kind != "vq" and autoencoder.codebook_size is not None:
        raise ConfigError(
            f"autoencoder.codebook_size={autoencoder.codebook_size}: only autoencoder.kind=vq has a codebook, and this "
            f"is kind={autoencoder.kind}; set autoencoder.codebook_size=null, or autoencoder.kind=vq"
        )
    if autoencoder.kind == "identity" and autoencoder.channel_multipliers != (1,):
        raise ConfigError(
            f"autoencoder.channel_multipliers={list(autoencoder.channel_multipliers)}: autoencoder.kind=identity has "
            "f = 1, pixels being the latents; set autoencoder.channel_multipliers=[1]"
        )
    if autoencoder.kind == "identity" and autoencoder.latent_channels != 3:
        raise ConfigError(
            f"autoencoder.latent_channels={autoencoder.latent_channels}: the latents of autoencoder.kind=identity are "
            "the pixels, of 3 channels; set autoencoder.latent_channels=3"
        )


def _check_latents(config: Config) -> None:
    kind = config.autoencoder.kind
    if config.latents.statistics == "per_channel" and kind != "kl":
        reason = {
            "vq": "the codes would have to be moved with the latents, and the paper does not rescale VQ latents",
            "identity": "no quant_conv and post_quant_conv exist that an export could fold them into",
        }[kind]
        raise ConfigError(
            f"latents.statistics=per_channel: not for autoencoder.kind={kind} ({reason}); set latents.statistics=scalar"
        )


def _check_codebook_losses(config: Config) -> None:
    loss, kind = config.autoencoder_loss, config.autoencoder.kind
    if kind == "vq":
        return
    for name, value, off in (
        ("codebook_update", loss.codebook_update, "gradient"),
        ("dead_code_images", loss.dead_code_images, 0),
    ):
        if value != off:
            raise ConfigError(
                f"autoencoder_loss.{name}={value} does nothing: autoencoder.kind={kind} has no codebook; set "
                f"autoencoder_loss.{name}={off}, or autoencoder.kind=vq"
            )


def _check_adversarial_loss(config: Config) -> None:
    loss, resolution = config.autoencoder_loss, config.data.resolution
    if loss.adversarial_weight == 0:  # switches off all that concerns the discriminator, whatever it is set to
        return
    # Each of the strided layers halves the side, the two closing 4x4 convolutions take one pixel each.
    smallest = 3 * 2**loss.discriminator_layers
    if resolution < smallest:
        raise ConfigError(
            f"autoencoder_loss.discriminator_layers={loss.discriminator_layers} leaves nothing of data.resolution="
            f"{resolution}: it needs {smallest} pixels; set fewer layers, or autoencoder_loss.adversarial_weight=0"
        )
    if loss.discriminator_pretrain_images > loss.discriminator_start_images:
        raise ConfigError(
            f"autoencoder_loss.discriminator_pretrain_images={loss.discriminator_pretrain_images} exceeds "
            f"autoencoder_loss.discriminator_start_images={loss.discriminator_start_images}: it would have to begin "
            f"before the first image; set discriminator_pretrain_images to at most {loss.discriminator_start_images}"
        )


def _check_discriminator_norm(config: Config, plan: BatchPlan, world_size: int) -> None:
    loss = config.autoencoder_loss
    if loss.adversarial_weight > 0 and loss.discriminator_norm == "batch" and plan.micro_batch != plan.global_batch:
        raise ConfigError(
            f"autoencoder_loss.discriminator_norm=batch: batch statistics would be those of {plan.micro_batch} of the "
            f"{plan.global_batch} images of a step ({_count(world_size, 'rank')}, "
            f"{_count(plan.accumulation_steps, 'forward pass', 'forward passes')} each), so that results depended on "
            "ranks and micro-batch; set autoencoder_loss.discriminator_norm=group, or use one rank with "
            "train.micro_batch=null"
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


def _check_attention_levels(section: str, network: AutoencoderConfig | UNetConfig) -> None:
    """Every level that shall have attention exists, and is named once, in order."""
    num_levels, found = len(network.channel_multipliers), network.attention_levels
    for level in found:
        if not 0 <= level < num_levels:
            raise ConfigError(
                f"{section}.attention_levels={list(found)}: level {level} does not exist; the {num_levels} levels are "
                f"0 (finest) to {num_levels - 1}"
            )
    if any(first >= second for first, second in pairwise(found)):
        raise ConfigError(
            f"{section}.attention_levels={list(found)}: must rise, without repetition; write {sorted(set(found))}"
        )


def _check_unet(unet: UNetConfig) -> None:
    _check_levels("unet", unet)
    if (unet.head_dim is None) == (unet.num_heads is None):
        raise ConfigError(
            f"unet.head_dim={_null(unet.head_dim)} and unet.num_heads={_null(unet.num_heads)}: exactly one must be "
            "set; set the other to null"
        )
    _check_attention_levels("unet", unet)
    num_levels = len(unet.channel_multipliers)
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
    if config.stage == "autoencoder" and config.autoencoder.kind == "identity":
        raise ConfigError(
            "autoencoder.kind=identity has nothing to train; write its artifact with `ldm-scale export "
            "experiment=identity_f1 --random-init --to safetensors --out DIR`, and give stage=diffusion artifact=DIR"
        )
    if config.stage == "diffusion" and config.train.activation_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing=true: only stage=autoencoder has it, the UNet not yet; set "
            "train.activation_checkpointing=false and a smaller train.micro_batch"
        )
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


def _null(value: float | None) -> str:
    return "null" if value is None else str(value)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
