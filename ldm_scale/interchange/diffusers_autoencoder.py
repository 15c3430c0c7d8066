"""Our autoencoders as models of diffusers, and back: `AutoencoderKL` for KL, `VQModel` for VQ.

Per-channel latent statistics, which no model of diffusers knows, are folded into the weights (folding.py); the
convolutions that this changes lie as they were in ldm_scale.safetensors, so that the way back is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from ldm_scale.config.schema import AutoencoderConfig, UNetConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact, expected_autoencoder_tensors, with_weights
from ldm_scale.interchange.folding import FOLDED, fold, unfold_kept
from ldm_scale.interchange.name_maps import NameMap, autoencoder_names, restore, translate
from ldm_scale.interchange.safetensors_io import read_tensors, write_tensors
from ldm_scale.models.autoencoder import LatentStatistics

# diffusers ships no types for its constructors.
_AutoencoderKL: Any = AutoencoderKL
_VQModel: Any = VQModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
ORIGINALS = "ldm_scale.safetensors"  # tensors of the autoencoder as they were before statistics were folded into them


def autoencoder_class(config: AutoencoderConfig) -> Any:
    """The class of diffusers that computes what an autoencoder of ours computes.

    Raises: CheckpointError if there is none.
    """
    if config.kind == "identity":
        raise CheckpointError(
            "autoencoder.kind=identity: diffusers has no autoencoder without weights, its pipelines for pixels have "
            "none at all; export with --to safetensors"
        )
    return _VQModel if config.kind == "vq" else _AutoencoderKL


def empty_autoencoder(config: AutoencoderConfig, statistics: LatentStatistics, resolution: int) -> nn.Module:
    """The `AutoencoderKL` or `VQModel` of a configuration of ours, without memory behind its weights.

    Attention of a level has one head there as here: diffusers makes a head as wide as the level.
    Raises: CheckpointError if there is none.
    """
    model_class = autoencoder_class(config)
    require_plain_first_level("autoencoder", config)
    _require_statistics(config, statistics)
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    has_attention = [level in config.attention_levels for level in range(len(widths))]
    if config.kind == "vq":
        own: dict[str, Any] = {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.latent_channels}
    else:
        own = {"shift_factor": statistics.shift or None}  # None is what most programs test for
    with torch.device("meta"):
        return model_class(  # type: ignore[no-any-return]
            down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in has_attention),
            up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(has_attention)),
            block_out_channels=tuple(widths),
            layers_per_block=config.num_res_blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            sample_size=resolution,
            scaling_factor=statistics.scale,
            mid_block_add_attention=config.mid_attention,
            **own,
        )


def fill_autoencoder(folder: Path, artifact: Artifact) -> None:
    """Nothing; `folder` holds the configuration and the weights of the model that computes what the artifact computes.

    Raises: CheckpointError if there is none.
    """
    model = empty_autoencoder(artifact.config, artifact.statistics, artifact.provenance["resolution"])
    state = fold(artifact.state, artifact.statistics)
    fill_model(folder, model, state, autoencoder_names(artifact.config), "the autoencoder")
    if artifact.statistics.channel_mean:
        write_tensors(folder / ORIGINALS, {name: artifact.state[name] for name in FOLDED})


def read_autoencoder(folder: Path, content: dict[str, Any]) -> Artifact:
    """The artifact of the weights in `folder`, described by `content`.

    Raises: CheckpointError if they do not fit.
    """
    described = Artifact(content, {})
    target = expected_autoencoder_tensors(described.config)
    path = folder / WEIGHTS
    state: Mapping[str, Tensor] = restore(read_tensors(path), autoencoder_names(described.config), target, str(path))
    if described.statistics.channel_mean:
        state = unfold_kept(state, described.statistics, folder / ORIGINALS)
    return Artifact(with_weights(content, state), state)


def fill_model(folder: Path, model: Any, state: Mapping[str, Tensor], names: NameMap, what: str) -> None:
    """Nothing; `folder` holds `state` as a model of diffusers like `model`."""
    write_tensors(folder / WEIGHTS, translate(state, names, model.state_dict(), what))
    model.save_config(folder)


def require_plain_first_level(section: str, config: AutoencoderConfig | UNetConfig) -> None:
    """Nothing, if the first level is as wide as the first convolution: diffusers has no separate base width.

    Raises: CheckpointError.
    """
    first = config.channel_multipliers[0]
    if first != 1:
        raise CheckpointError(
            f"{section}.channel_multipliers[0]={first}: diffusers has no model whose first level is wider than its "
            "first convolution or its timestep embedding; train with a first multiplier of 1 and "
            f"{section}.base_channels={config.base_channels * first}, or export with --to safetensors"
        )


def _require_statistics(config: AutoencoderConfig, statistics: LatentStatistics) -> None:
    """The latent statistics have a place in a model of diffusers."""
    if config.kind == "vq" and statistics.channel_mean:
        raise CheckpointError(
            "latent_statistics.channel_mean: VQModel has one scale for all channels, and folding them into quant_conv "
            "would move the latents away from the codes; export with --to safetensors"
        )
    if config.kind == "vq" and statistics.shift != 0.0:
        raise CheckpointError(
            f"latent_statistics.shift={statistics.shift}: VQModel has a scaling_factor and no shift; export with --to "
            "safetensors"
        )
