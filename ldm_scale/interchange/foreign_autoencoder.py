"""Autoencoders of diffusers that other software wrote, as artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL, VQModel

from ldm_scale.config.networks import check_attention_levels, check_levels
from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.engine.lazy_tensors import LazyTensors
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import expected_autoencoder_tensors
from ldm_scale.interchange.diffusers_autoencoder import empty_autoencoder
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
from ldm_scale.interchange.name_maps import autoencoder_names, modern_attention_names, restore
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.telemetry.log import get_logger

AUTOENCODER_CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}

# Of no effect on what is computed, or read beside: the resolution of training, precision, the statistics, and what
# `force_not_quantize` reads instead of latents.
_FREE = frozenset({"sample_size", "force_upcast", "scaling_factor", "shift_factor", "lookup_from_codebook"})


class ForeignAutoencoder(NamedTuple):
    """An autoencoder of diffusers in our terms."""

    config: AutoencoderConfig
    state: LazyTensors
    statistics: LatentStatistics
    resolution: int | None


def read_foreign_autoencoder(folder: Path) -> ForeignAutoencoder:
    """The autoencoder in `folder`.

    Raises: as `foreign_unet.read_foreign_unet`.
    """
    path = folder / CONFIG
    given = read_class_config(path)
    name = given["_class_name"]
    if name not in AUTOENCODER_CLASSES:
        raise CheckpointError(
            f"{path}: _class_name={name!r}: autoencoders here are {' and '.join(AUTOENCODER_CLASSES)}; this model "
            "cannot be imported"
        )
    theirs, model = empty_model(AUTOENCODER_CLASSES[name], folder)
    config = autoencoder_config_of(path, theirs, name)
    held: Any = empty_autoencoder(config, LatentStatistics(), 1)
    require_same(path, theirs, dict(held.config), _normal, _FREE)
    state = modern_attention_names(read_foreign_tensors(folder, DIFFUSERS_STEMS))
    require_tensors(path, state, model.state_dict())
    return ForeignAutoencoder(
        config,
        restore(state, autoencoder_names(config), expected_autoencoder_tensors(config), str(folder)),
        _statistics(path, theirs, given),
        side_of(Section.of_json(path, theirs)),
    )


def autoencoder_config_of(path: Path, theirs: Plain, class_name: str) -> AutoencoderConfig:
    """Our configuration of the autoencoder that `theirs` describes, as `foreign_unet.unet_config_of`."""
    section = Section.of_json(path, theirs)
    base, multiples = multipliers(section)
    is_vq = class_name == "VQModel"
    config = AutoencoderConfig(
        kind="vq" if is_vq else "kl",
        base_channels=base,
        channel_multipliers=multiples,
        num_res_blocks=section.same("layers_per_block", at_most=MAX_LAYERS),
        latent_channels=section.integer("latent_channels", at_least=1),
        norm_groups=section.integer("norm_num_groups", at_least=1),
        mid_attention=section.boolean("mid_block_add_attention"),
        attention_levels=tuple(
            level for level, block in enumerate(section.texts("down_block_types")) if block.startswith("Attn")
        ),
        codebook_size=section.integer("num_vq_embeddings", at_least=1) if is_vq else None,
    )
    checked(path, lambda: check_levels("autoencoder", config))
    checked(path, lambda: check_attention_levels("autoencoder", config))
    return config


def _statistics(path: Path, theirs: Plain, given: Plain) -> LatentStatistics:
    """The map from raw latents to latents of the programs that use the autoencoder.

    Files from before diffusers had the key were read by pipelines that took 0.18215 for a KL autoencoder, which is the
    key's default, and no scale for a VQ one, which today's default spoils.
    """
    section = Section.of_json(path, theirs)
    scale = section.number("scaling_factor", above=0)
    if "scaling_factor" not in given:
        scale = 1.0 if "num_vq_embeddings" in theirs else scale
        get_logger().warning(f"{path} has no scaling_factor: it is older than the key; latents are scaled by {scale:g}")
    return LatentStatistics(shift=section.number("shift_factor") if theirs.get("shift_factor") else 0.0, scale=scale)


def _normal(config: Plain) -> Plain:
    """The configuration with one spelling for what diffusers builds alike."""
    normal = tuples(config)
    if "num_vq_embeddings" in normal:
        normal["vq_embed_dim"] = normal["vq_embed_dim"] or normal["latent_channels"]
    return normal
