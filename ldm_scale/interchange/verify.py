"""Proof that an exported folder computes what our model computes, on the files as diffusers reads them.

Two checks per part: the tensors that diffusers loads are exactly ours, and both networks give the same output on
fixed inputs. Layers that start at zero (and would hide everything before them in an untrained model) are given fixed
random values on both sides for the second check.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm_scale.conditioning.text import TextCondition
from ldm_scale.conditioning.tokenizers import build_tokenizer
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.diffusers import conditioner_state, require_text_alone, unet_state
from ldm_scale.interchange.diffusers_autoencoder import autoencoder_class
from ldm_scale.interchange.folding import fold
from ldm_scale.interchange.name_maps import NameMap, autoencoder_names, text_encoder_names, translate, unet_names
from ldm_scale.interchange.text_encoder import loadable, pipeline_of, published, tokenizer_class
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_unet

TOLERANCE = 1e-4  # of the outputs' relative difference, in float32
ZERO_REPLACEMENT_STD = 0.02
CAPTIONS = ("", "a red apple on a white plate", "Grinning Face", "flag: Cote d'Ivoire, 3 stars")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def measure_differences(folder: Path, artifact: Artifact | DiffusionArtifact) -> dict[str, float]:
    """|theirs - ours| / |ours| of every part of an exported folder.

    Raises: CheckpointError if one exceeds TOLERANCE, or a tensor or token is not ours.
    """
    with torch.no_grad():
        if isinstance(artifact, Artifact):
            differences = _compare_autoencoder(folder, artifact)
        else:
            text = require_text_alone(artifact.conditioning)
            pipeline = pipeline_of(text)
            _compare_tokens(folder / "tokenizer", text)
            differences = _compare_autoencoder(folder / pipeline.autoencoder, artifact.autoencoder)
            differences |= _compare_text_encoder(folder / pipeline.text_encoder, text, artifact)
            differences |= _compare_unet(folder / "unet", artifact)
    for part, difference in differences.items():
        # Written so that a NaN fails too.
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"the exported {part} differs from ours by {difference:.2e} of its norm (allowed {TOLERANCE:.0e}), so "
                "nothing was written; this is a defect of ldm-scale: please report the configuration"
            )
    return differences


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    """|theirs - ours| / |ours|."""
    assert theirs.shape == ours.shape, f"{theirs.shape} and {ours.shape} cannot be compared"
    return float((theirs.double() - ours.double()).norm() / ours.double().norm())


def load_both(
    ours: nn.Module,
    theirs: nn.Module,
    state: dict[str, Tensor],
    names: NameMap,
    statistics: LatentStatistics | None = None,
) -> None:
    """Nothing; both networks hold `state`, with fixed random values where a tensor is zero throughout.

    Theirs holds it with the latent statistics folded in, where an export folds them.
    """
    generator = torch.Generator().manual_seed(0)
    filled = {
        name: tensor if tensor.any() else torch.randn(tensor.shape, generator=generator) * ZERO_REPLACEMENT_STD
        for name, tensor in state.items()
    }
    ours.load_state_dict(filled, assign=True)
    folded = filled if statistics is None else fold(filled, statistics)
    theirs.load_state_dict(_translated_for(theirs, folded, names))


def _compare_autoencoder(folder: Path, artifact: Artifact) -> dict[str, float]:
    theirs = _open(autoencoder_class(artifact.config), folder)
    names = autoencoder_names(artifact.config)
    _require_loaded(theirs, fold(artifact.state, artifact.statistics), names)
    ours = _on_meta(lambda: build_autoencoder(artifact.config))
    load_both(ours, theirs, artifact.state, names, artifact.statistics)
    ours.statistics = artifact.statistics

    f = artifact.config.downsampling_factor
    x = _noise(2, 3, 2 * f, 3 * f).clamp(-1, 1)
    if ours.quantizer is not None:
        return _compare_vq(ours, theirs, x)
    z = _noise(2, artifact.config.latent_channels, 2, 3)
    shift, scale = theirs.config.shift_factor or 0.0, theirs.config.scaling_factor
    posterior = theirs.encode(x).latent_dist
    mean, logvar = ours.encode_moments(x)
    assert logvar is not None, "the posterior of a KL autoencoder has a variance"
    if artifact.statistics.channel_mean:
        # Folded: their posterior is that of our latents.
        std = torch.tensor(artifact.statistics.channel_std).view(1, -1, 1, 1)
        mean, logvar = artifact.statistics.normalize(mean), logvar - 2 * std.log()
    return {
        "autoencoder's latents": relative_difference((posterior.mode() - shift) * scale, ours.encode(x)),
        "autoencoder's posterior": relative_difference(
            torch.cat([posterior.mean, posterior.logvar], dim=1), torch.cat([mean, logvar], dim=1)
        ),
        "autoencoder's pixels": relative_difference(theirs.decode(z / scale + shift).sample, ours.decode(z)),
    }


def _compare_vq(ours: Autoencoder, theirs: Any, x: Tensor) -> dict[str, float]:
    """Latents before quantisation, and pixels of latents that lie on codes.

    Anywhere else two searches may take different ones of two codes that are equally near, to rounding.
    """
    assert ours.quantizer is not None, "a VQ autoencoder has a codebook"
    codebook, scale = ours.quantizer.codebook, theirs.config.scaling_factor
    chosen = torch.linspace(0, codebook.shape[0] - 1, 2 * 4 * 6).long()
    z = ours.statistics.normalize(codebook[chosen].view(2, 4, 6, -1).permute(0, 3, 1, 2))
    return {
        "autoencoder's latents": relative_difference(theirs.encode(x).latents * scale, ours.encode(x)),
        "autoencoder's pixels": relative_difference(theirs.decode(z / scale).sample, ours.decode(z)),
    }


def _compare_unet(folder: Path, artifact: DiffusionArtifact) -> dict[str, float]:
    theirs = _open(UNet2DConditionModel, folder)
    state, names = unet_state(artifact.state), unet_names(artifact.unet)
    _require_loaded(theirs, state, names)
    channels, text = artifact.autoencoder.config.latent_channels, require_text_alone(artifact.conditioning)
    ours = _on_meta(lambda: build_unet(artifact.unet, channels, channels, text.width))
    load_both(ours, theirs, state, names)

    smallest = 2 ** (len(artifact.unet.channel_multipliers) - 1)
    z = _noise(2, channels, 2 * smallest, 3 * smallest)
    t = torch.tensor([1, artifact.diffusion.num_timesteps - 1])
    context = _noise(2, text.max_tokens, text.width)
    return {"UNet": relative_difference(theirs(z, t, context).sample, ours(z, t, context))}


def _compare_text_encoder(folder: Path, text: TextConditioningConfig, artifact: DiffusionArtifact) -> dict[str, float]:
    theirs = _open(pipeline_of(text).text_model, folder)
    state, names = conditioner_state(artifact.state), text_encoder_names(text)
    _require_loaded(theirs, state, names)
    ours = _on_meta(lambda: TextCondition(text))
    load_both(ours, theirs, state, names)
    tokens = ours.tokens(CAPTIONS)
    return {"text encoder": relative_difference(theirs(tokens)[0], ours(tokens, (1, 1)))}


def _compare_tokens(folder: Path, text: TextConditioningConfig) -> None:
    tokenizer: Any = tokenizer_class(text).from_pretrained(folder)
    theirs = tokenizer(list(CAPTIONS), padding="max_length", truncation=True, return_tensors="pt").input_ids
    ours, _ = build_tokenizer(text)(CAPTIONS, text.max_tokens)
    if not torch.equal(theirs, ours):
        raise CheckpointError(
            f"the exported tokenizer gives {theirs.tolist()} where ours gives {ours.tolist()}, so nothing was written; "
            "this is a defect of ldm-scale: please report the version of transformers"
        )


def _require_loaded(theirs: nn.Module, state: dict[str, Tensor], names: NameMap) -> None:
    """Nothing, if what was read back from disk is exactly what was to be written."""
    loaded = theirs.state_dict()
    for name, tensor in _translated_for(theirs, state, names).items():
        if not torch.equal(loaded[name], tensor):
            raise CheckpointError(
                f"{type(theirs).__name__}: {name} is read back with other values than were written, so nothing was "
                "written; is the disk sound?"
            )


def _translated_for(theirs: nn.Module, state: dict[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """`state` under the names that `theirs` has in memory."""
    own = theirs.state_dict()
    return loadable(translate(state, names, published(own, type(theirs)), type(theirs).__name__), own)


def _open(model_class: Any, folder: Path) -> Any:
    """The model in an exported folder, read as a stranger's program reads it, in evaluation mode."""
    return model_class.from_pretrained(folder).eval()


def _on_meta(build: Callable[[], ModuleT]) -> ModuleT:
    """The network that `build` returns, in evaluation mode and without memory behind its weights."""
    with torch.device("meta"):
        return build().eval()


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
