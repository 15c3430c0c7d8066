"""Rules of the networks: shapes of the autoencoder's and the UNet's levels, kinds of conditioning, the classifier.

Apart from `validate.py`, which says for which stage each rule holds.
"""

from __future__ import annotations

from itertools import pairwise

from ldm_scale.config.fit import neighbours
from ldm_scale.config.schema import (
    AutoencoderConfig,
    Config,
    LayoutConditioningConfig,
    TextConditioningConfig,
    UNetConfig,
)
from ldm_scale.errors import ConfigError

# OpenCLIP's tokenizer numbers its tokens up to 49407; a smaller table would be read past its end.
TOKENIZER_VOCABULARY = 49408
# Kinds of conditioning that the UNet attends to; the others are concatenated to its input.
CONTEXT_KINDS = ("text", "frozen_text", "classes", "layout")
# The start and the end token and room for one word.
MIN_TOKENS = 3
MIN_LAYOUT_TOKENS = 5


def check_levels(section: str, network: AutoencoderConfig | UNetConfig) -> None:
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


def check_attention_levels(section: str, network: AutoencoderConfig | UNetConfig) -> None:
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


def check_kind(autoencoder: AutoencoderConfig) -> None:
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


def check_unet(unet: UNetConfig) -> None:
    """Nothing, if the UNet's levels can have their norms and heads."""
    check_levels("unet", unet)
    if (unet.head_dim is None) == (unet.num_heads is None):
        raise ConfigError(
            f"unet.head_dim={_null(unet.head_dim)} and unet.num_heads={_null(unet.num_heads)}: exactly one must be "
            "set; set the other to null"
        )
    check_attention_levels("unet", unet)
    if unet.base_channels % 2:
        raise ConfigError(
            f"unet.base_channels={unet.base_channels}: the embedding of the timestep is as wide, half of it sines and "
            f"half cosines; set an even number, such as {unet.base_channels + 1}"
        )
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


def check_attention(config: Config) -> None:
    """Spatial transformers where there is a context, plain self-attention where there is none."""
    kinds = [name for name in CONTEXT_KINDS if getattr(config.conditioning, name) is not None]
    if config.unet.attention == "transformer" and not kinds:
        raise ConfigError(
            "unet.attention=transformer: cross-attention needs a context, and conditioning has none of "
            f"{', '.join(CONTEXT_KINDS)}; set unet.attention=self, or choose one, such as conditioning=classes"
        )
    if config.unet.attention == "self" and kinds:
        raise ConfigError(
            f"unet.attention=self: no layer would see the context of conditioning.{kinds[0]}; set "
            f"unet.attention=transformer, or conditioning.{kinds[0]}=null"
        )


def check_context(config: Config) -> None:
    """Kinds of conditioning through cross-attention: each by itself, and all of one width, for their tokens' sake."""
    conditioning = config.conditioning
    if conditioning.text is not None:
        _check_text(conditioning.text)
        _check_heads("conditioning.text", conditioning.text)
    if conditioning.layout is not None:
        _check_layout(conditioning.layout)
        _check_heads("conditioning.layout", conditioning.layout)
    sections = {name: getattr(conditioning, name) for name in CONTEXT_KINDS}
    widths = {name: section.width for name, section in sections.items() if section is not None}
    if len(set(widths.values())) > 1:
        raise ConfigError(
            f"{', '.join(f'conditioning.{name}.width={width}' for name, width in widths.items())}: the tokens of all "
            "kinds go through the same cross-attention; give them one width"
        )


def _check_text(text: TextConditioningConfig) -> None:
    if text.encoder == "clip" and text.head_dim is not None:
        raise ConfigError(
            f"conditioning.text.head_dim={text.head_dim}: heads of encoder=clip are width / num_heads wide; set "
            "conditioning.text.head_dim=null, or encoder=bert"
        )
    if text.max_tokens < MIN_TOKENS:
        raise ConfigError(
            f"conditioning.text.max_tokens={text.max_tokens}: must be at least {MIN_TOKENS} (start, one word, end); "
            "CLIP has 77"
        )
    if text.tokenizer == "clip" and text.vocab_size < TOKENIZER_VOCABULARY:
        raise ConfigError(
            f"conditioning.text.vocab_size={text.vocab_size}: the tokenizer numbers {TOKENIZER_VOCABULARY} tokens; set "
            f"conditioning.text.vocab_size={TOKENIZER_VOCABULARY}"
        )
    if text.tokenizer == "wordpiece" and text.padding != "end":
        raise ConfigError(
            f"conditioning.text.padding={text.padding}: tokenizer=wordpiece has a token of its own for it, [PAD]; set "
            "conditioning.text.padding=end"
        )
    if text.tokenizer == "clip" and text.vocabulary is not None:
        raise ConfigError(
            f"conditioning.text.vocabulary={text.vocabulary}: tokenizer=clip brings its own vocabulary; set "
            "conditioning.text.vocabulary=null, or tokenizer=wordpiece"
        )


def _check_layout(layout: LayoutConditioningConfig) -> None:
    """Tokens of classes and of cells share the numbers below the last, which says "none"."""
    if layout.num_classes >= layout.num_tokens:
        raise ConfigError(
            f"conditioning.layout.num_classes={layout.num_classes} needs a token per class and one for none, and "
            f"num_tokens={layout.num_tokens}; set conditioning.layout.num_tokens to at least {layout.num_classes + 1}"
        )
    if layout.num_tokens < MIN_LAYOUT_TOKENS:
        raise ConfigError(
            f"conditioning.layout.num_tokens={layout.num_tokens}: must be at least {MIN_LAYOUT_TOKENS}, for a grid of "
            "2 x 2 cells and none; the paper has 8192"
        )


def _check_heads(section: str, config: TextConditioningConfig | LayoutConditioningConfig) -> None:
    if config.head_dim is None and config.width % config.num_heads:
        raise ConfigError(
            f"{section}.width={config.width} does not divide by {section}.num_heads={config.num_heads}; set "
            f"{section}.num_heads to a divisor, such as {_largest_divisor(config.width, config.num_heads)}"
        )


def check_spatial(config: Config) -> None:
    """A small image that all of reaches the UNet, from whole pixels."""
    section = config.conditioning.low_resolution
    if section is None:
        return
    factor, f, resolution = section.factor, config.autoencoder.downsampling_factor, config.data.resolution
    if factor < f:
        raise ConfigError(
            f"conditioning.low_resolution.factor={factor} is below the autoencoder's f={f}: the small image would be "
            f"larger than the latents, and shrunk to them; set the factor to {f} or more, or take an autoencoder with "
            f"f={factor} or less"
        )
    if resolution % factor:
        raise ConfigError(
            f"data.resolution={resolution} does not divide by conditioning.low_resolution.factor={factor}; set "
            f"data.resolution to a multiple of {factor} ({neighbours(resolution, factor)})"
        )


def check_classifier(config: Config) -> None:
    """Nothing, if a classifier of latents can be built of the UNet's way down."""
    unet, classifier = config.unet, config.classifier
    for name, section in vars(config.conditioning).items():
        if section is not None:
            raise ConfigError(
                f"conditioning.{name}: a classifier of latents sees nothing beside them; set conditioning=none, or "
                f"conditioning.{name}=null"
            )
    if unet.attention != "self":
        raise ConfigError(
            f"unet.attention={unet.attention}: a classifier of latents has no context for transformers; set "
            "unet.attention=self"
        )
    channels = unet.base_channels * unet.channel_multipliers[-1]
    if channels % classifier.pool_head_dim:
        raise ConfigError(
            f"classifier.pool_head_dim={classifier.pool_head_dim} does not divide the {channels} channels of the "
            f"UNet's last level; set classifier.pool_head_dim={_largest_divisor(channels, classifier.pool_head_dim)}"
        )


def _largest_divisor(value: int, limit: int) -> int:
    return max(d for d in range(1, min(value, limit) + 1) if value % d == 0)


def _null(value: float | None) -> str:
    return "null" if value is None else str(value)
