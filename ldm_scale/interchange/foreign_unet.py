"""UNets of diffusers that other software wrote, as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from ldm_scale.config.networks import check_unet
from ldm_scale.config.schema import UNetConfig
from ldm_scale.engine.lazy_tensors import LazyTensors
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.diffusers_unet import empty_unet
from ldm_scale.interchange.foreign_config import (
    CONFIG,
    Plain,
    checked,
    empty_model,
    multipliers,
    read_class_config,
    require_same,
    require_tensors,
    side_of,
    tuples,
)
from ldm_scale.interchange.foreign_section import MAX_LAYERS, Section
from ldm_scale.interchange.foreign_weights import DIFFUSERS_STEMS, read_foreign_tensors
from ldm_scale.interchange.name_maps import modern_attention_names, restore, unet_names
from ldm_scale.models.build import build_unet

UNET_CLASSES: dict[str, Any] = {"UNet2DConditionModel": UNet2DConditionModel, "UNet2DModel": UNet2DModel}

# Of no effect on what is computed: the size that a pipeline draws by default, in which precision attention multiplies,
# and the number of timesteps and heads of embeddings that are compared under other keys.
_FREE = frozenset({"sample_size", "upcast_attention", "num_train_timesteps", "addition_embed_type_num_heads"})
_PER_LEVEL = (
    "attention_head_dim",
    "cross_attention_dim",
    "layers_per_block",
    "only_cross_attention",
    "transformer_layers_per_block",
)
_OF_ATTENTION = ("attention_head_dim", "cross_attention_dim", "transformer_layers_per_block")


class ForeignUNet(NamedTuple):
    """A UNet of diffusers in our terms."""

    config: UNetConfig
    state: LazyTensors
    latent_channels: int
    spatial_channels: int  # beside the latents
    context_dim: int | None
    latent_side: int | None  # that its pipeline draws by default


def read_foreign_unet(folder: Path) -> ForeignUNet:
    """The UNet in `folder`.

    Raises: CheckpointError if ours cannot compute the same, with the key of its configuration; or if its weights are
    not those of its configuration.
    """
    path = folder / CONFIG
    name = read_class_config(path)["_class_name"]
    if name not in UNET_CLASSES:
        raise CheckpointError(
            f"{path}: _class_name={name!r}: UNets here are {' and '.join(UNET_CLASSES)}; this model cannot be imported"
        )
    theirs, model = empty_model(UNET_CLASSES[name], folder)
    config = unet_config_of(path, theirs, is_conditional=name == "UNet2DConditionModel")
    section = Section.of_json(path, theirs)
    channels = section.integer("out_channels", at_least=1)
    spatial = section.integer("in_channels", at_least=1) - channels
    if spatial < 0:
        raise CheckpointError(
            f"{path}: out_channels={channels} with in_channels={theirs['in_channels']}: UNets here give one number for "
            "each latent (no learned variances); this model cannot be imported"
        )
    context_dim = None if config.attention == "self" else section.same("cross_attention_dim")
    held: Any = empty_unet(config, channels, context_dim, 1, spatial)
    require_same(path, theirs, dict(held.config), _normal, _FREE)

    state = modern_attention_names(read_foreign_tensors(folder, DIFFUSERS_STEMS))
    require_tensors(path, state, model.state_dict())
    with torch.device("meta"):
        target = build_unet(config, channels + spatial, channels, context_dim).state_dict()
    return ForeignUNet(
        config,
        restore(state, unet_names(config), target, str(folder)),
        channels,
        spatial,
        context_dim,
        side_of(section),
    )


def unet_config_of(path: Path, theirs: Plain, is_conditional: bool) -> UNetConfig:
    """Our configuration of the UNet that `theirs` describes, as far as ours can; `require_same` says whether it can.

    Raises: CheckpointError for sizes that have no place in ours.
    """
    section = Section.of_json(path, theirs)
    base, multiples = multipliers(section)
    blocks = section.texts("down_block_types")
    levels = tuple(level for level, block in enumerate(blocks) if block.startswith(("CrossAttn", "Attn")))
    common: dict[str, Any] = {
        "base_channels": base,
        "channel_multipliers": multiples,
        "num_res_blocks": section.same("layers_per_block", at_most=MAX_LAYERS),
        "attention_levels": levels,
        "norm_groups": section.integer("norm_num_groups", at_least=1),
        "scale_shift_norm": theirs["resnet_time_scale_shift"] == "scale_shift",
        "dropout": section.number("dropout", at_least=0, below=1),
    }
    if is_conditional:
        heads, head_dim = _conditional_heads(path, theirs, {*levels, len(blocks) - 1})
        config = UNetConfig(
            **common,
            num_heads=heads,
            head_dim=head_dim,
            transformer_depth=section.same("transformer_layers_per_block", at_most=MAX_LAYERS),
            linear_projection=section.boolean("use_linear_projection"),
        )
    else:
        given = theirs["attention_head_dim"]
        head_dim = None if given is None else section.integer("attention_head_dim", at_least=1)
        config = UNetConfig(
            **common,
            attention="self",
            head_dim=head_dim,
            num_heads=1 if head_dim is None else None,
            linear_projection=False,
            residual_resampling=any(block.startswith("Resnet") for block in blocks)
            or (bool(levels) and theirs["downsample_type"] == "resnet"),
        )
    checked(path, lambda: check_unet(config))
    return config


def _conditional_heads(path: Path, theirs: Plain, levels: set[int]) -> tuple[int | None, int | None]:
    """Number or else width of the heads at `levels`; `attention_head_dim` is the number, whatever its name says."""
    given, widths = theirs["attention_head_dim"], theirs["block_out_channels"]
    if type(given) is int and given > 0:
        return given, None
    heads = (
        {level: given[level] for level in levels}
        if isinstance(given, list | tuple) and len(given) == len(widths)
        else {}
    )
    if heads and all(isinstance(number, int) and number > 0 for number in heads.values()):
        dims = {widths[level] / number for level, number in heads.items()}
        if len(dims) == 1 and (dim := dims.pop()).is_integer():
            return None, int(dim)
        if len(set(heads.values())) == 1:
            return next(iter(heads.values())), None
    raise CheckpointError(
        f"{path}: attention_head_dim={list(given) if isinstance(given, tuple) else given} with block_out_channels="
        f"{list(widths)}: heads here have one number or one width on all levels; this model cannot be imported"
    )


def _normal(config: Plain) -> Plain:
    """The configuration with one spelling for what diffusers builds alike."""
    normal = tuples(config)
    widths, blocks = normal["block_out_channels"], normal["down_block_types"]
    for key in _PER_LEVEL:
        if key in normal and not isinstance(normal[key], tuple):
            normal[key] = (normal[key],) * len(widths)
    idle = [level for level, block in enumerate(blocks) if "Attn" not in block and level < len(blocks) - 1]
    for key in _OF_ATTENTION:
        if key in normal:
            normal[key] = tuple(None if level in idle else value for level, value in enumerate(normal[key]))
    if "use_linear_projection" not in normal:  # UNet2DModel, whose attention_head_dim is what its name says
        dims = normal["attention_head_dim"]
        normal["attention_head_dim"] = tuple(
            None if level in idle else width // (dim or width)
            for level, (width, dim) in enumerate(zip(widths, dims, strict=True))
        )
        if normal["attn_norm_num_groups"] is None and normal["resnet_time_scale_shift"] == "default":
            normal["attn_norm_num_groups"] = normal["norm_num_groups"]
        if not any("Attn" in block for block in blocks):
            # Only levels with attention ask how to resample; the others say it by their type.
            normal["downsample_type"] = normal["upsample_type"] = "conv"
    normal["time_embedding_dim"] = normal["time_embedding_dim"] or 4 * widths[0]
    return normal
