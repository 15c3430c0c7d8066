"""The UNet of diffusers that computes what ours does: `UNet2DConditionModel` with a context, `UNet2DModel` without.

Channels concatenated to the latents are input channels of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ldm_scale.config.schema import UNetConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, deferred
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.diffusers_autoencoder import require_plain_first_level
from ldm_scale.models.unet import num_heads

# diffusers ships no types for its constructors.
_UNet2DConditionModel: Any = UNet2DConditionModel
_UNet2DModel: Any = UNet2DModel

_FIRST = "conv_in.weight"


def unet_class(config: UNetConfig) -> Any:
    """The class of diffusers that computes what a UNet of ours computes."""
    return _UNet2DModel if config.attention == "self" else _UNet2DConditionModel


def empty_unet(
    config: UNetConfig,
    latent_channels: int,
    context_dim: int | None,
    latent_side: int,
    spatial_channels: int = 0,
) -> nn.Module:
    """The UNet of diffusers of a configuration of ours, without memory behind its weights.

    Raises: CheckpointError if there is none; it names the part.
    """
    require_plain_first_level("unet", config)
    common: dict[str, Any] = {
        "sample_size": latent_side,
        "in_channels": latent_channels + spatial_channels,
        "out_channels": latent_channels,
        "block_out_channels": tuple(config.base_channels * multiplier for multiplier in config.channel_multipliers),
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }
    with torch.device("meta"):
        if config.attention == "self":
            return unet_class(config)(**common, **_plain_options(config))  # type: ignore[no-any-return]
        assert context_dim is not None, "validated: transformers have a context"
        return unet_class(config)(  # type: ignore[no-any-return]
            **common, **_transformer_options(config), cross_attention_dim=context_dim
        )


def _transformer_options(config: UNetConfig) -> dict[str, Any]:
    """diffusers calls the number of heads `attention_head_dim`, a misnomer that published models have fixed."""
    if config.residual_resampling:
        raise CheckpointError(
            "unet.residual_resampling=true with unet.attention=transformer: UNet2DConditionModel resamples by single "
            "convolutions where it has cross-attention; export with --to safetensors"
        )
    heads = [heads or config.num_heads or 1 for heads in _heads(config)]
    return {
        "down_block_types": _blocks(config, "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": _blocks(config, "CrossAttnUpBlock2D", "UpBlock2D")[::-1],
        "transformer_layers_per_block": config.transformer_depth,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else tuple(heads),
        "use_linear_projection": config.linear_projection,
    }


def _plain_options(config: UNetConfig) -> dict[str, Any]:
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    heads = _heads(config)
    dims = sorted({width // number for width, number in zip(widths, heads, strict=True) if number})
    head_dim: int | None = dims[0]
    if len(dims) > 1 and config.num_heads == 1:
        head_dim = None  # their word for one head, as wide as its level
    elif len(dims) > 1:
        raise CheckpointError(
            f"unet.num_heads={config.num_heads} with unet.attention=self: heads of {dims[0]} to {dims[-1]}, and "
            "UNet2DModel has one width for all levels; export with --to safetensors"
        )
    resampling, down, up = "conv", "DownBlock2D", "UpBlock2D"
    if config.residual_resampling:
        resampling, down, up = "resnet", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    return {
        "down_block_types": _blocks(config, "AttnDownBlock2D", down),
        "up_block_types": _blocks(config, "AttnUpBlock2D", up)[::-1],
        "attention_head_dim": head_dim,
        "attn_norm_num_groups": config.norm_groups,  # without it, scale and shift would cost the middle its norm
        "downsample_type": resampling,
        "upsample_type": resampling,
    }


def _heads(config: UNetConfig) -> list[int | None]:
    """Attention heads of each level; None of one that has no attention and is not beside the middle."""
    last = len(config.channel_multipliers) - 1
    return [
        num_heads(config, config.base_channels * multiplier)
        if level in config.attention_levels or level == last
        else None
        for level, multiplier in enumerate(config.channel_multipliers)
    ]


def _blocks(config: UNetConfig, with_attention: str, without: str) -> tuple[str, ...]:
    """Block types of the levels, from the finest."""
    levels = range(len(config.channel_multipliers))
    return tuple(with_attention if level in config.attention_levels else without for level in levels)


def their_input_order(state: Mapping[str, Tensor], latent_channels: int) -> LazyTensors:
    """An inpainting UNet that takes its mask before the masked image's latents, as Stable Diffusion's; ours is last."""
    c = latent_channels
    return _with_inputs(state, [*range(c), 2 * c, *range(c, 2 * c)])


def our_input_order(state: Mapping[str, Tensor], latent_channels: int) -> LazyTensors:
    """The inverse of `their_input_order`."""
    c = latent_channels
    return _with_inputs(state, [*range(c), *range(c + 1, 2 * c + 1), c])


def _with_inputs(state: Mapping[str, Tensor], order: list[int]) -> LazyTensors:
    return LazyTensors(deferred(state)) | {_FIRST: state[_FIRST][:, order]}
