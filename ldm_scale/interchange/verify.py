"""Proof that an exported folder computes what our model computes, on the files as diffusers reads them.

Two checks per part: the tensors that diffusers loads are exactly ours, and both networks give the same output on
fixed inputs. Layers that start at zero (and would hide everything before them in an untrained model) are given fixed
random values on both sides for the second check. The two networks of a part come one after the other, so that memory
holds one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm_scale.conditioning.text import TextCondition
from ldm_scale.conditioning.tokenizers import build_tokenizer
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, deferred
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.diffusers import conditioner_state, require_text_alone, unet_state
from ldm_scale.interchange.diffusers_autoencoder import autoencoder_class
from ldm_scale.interchange.folding import fold
from ldm_scale.interchange.name_maps import NameMap, autoencoder_names, text_encoder_names, translate, unet_names
from ldm_scale.interchange.safetensors_io import passing
from ldm_scale.interchange.text_encoder import loadable, pipeline_of, published, tokenizer_class
from ldm_scale.models.autoencoder import LatentStatistics
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


def filled(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` with fixed random values where a tensor is zero throughout."""
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(tensor.shape, generator=generator) * ZERO_REPLACEMENT_STD
        for name, tensor in passing(state, "looking for zeros")
        if not tensor.any()
    }
    return LazyTensors(deferred(state)) | noise if noise else state


def fill_theirs(
    theirs: nn.Module,
    state: Mapping[str, Tensor],
    full: Mapping[str, Tensor],
    names: NameMap,
    statistics: LatentStatistics | None = None,
) -> None:
    """Nothing; the network, as it was opened, holds `state`, and from now on `full`, which is `filled(state)`.

    Theirs holds it with the latent statistics folded in, where an export folds them.
    Raises: CheckpointError if what was opened is not exactly what was to be written.
    """
    own, tensors = theirs.state_dict(), _translated_for(theirs, _folded(state, statistics), names)
    for name, tensor in passing(tensors, f"comparing {type(theirs).__name__}"):
        if not torch.equal(own[name], tensor):
            raise CheckpointError(
                f"{type(theirs).__name__}: {name} is read back with other values than were written, so nothing was "
                "written; is the disk sound?"
            )
    if full is not state:
        for name, tensor in _translated_for(theirs, _folded(full, statistics), names).items():
            if not torch.equal(own[name], tensor):
                own[name].copy_(tensor)


def _folded(state: Mapping[str, Tensor], statistics: LatentStatistics | None) -> Mapping[str, Tensor]:
    return state if statistics is None else fold(state, statistics)


def _differences(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, float]:
    """Of the outputs of both, by part.

    Theirs are computed first: their weights are pages of a mapped file, which go with the network. Memory of ours may
    stay with the allocator, for what comes after.
    """
    return {part: relative_difference(output, ours[part]) for part, output in theirs.items()}


def _compare_autoencoder(folder: Path, artifact: Artifact) -> dict[str, float]:
    f, full = artifact.config.downsampling_factor, filled(artifact.state)
    x = _noise(2, 3, 2 * f, 3 * f).clamp(-1, 1)
    z = _latents(artifact, full)
    return _differences(_their_autoencoder(folder, artifact, full, x, z), _our_autoencoder(artifact, full, x, z))


def _latents(artifact: Artifact, full: Mapping[str, Tensor]) -> Tensor:
    """Latents to decode.

    Those of a VQ model lie on codes. Anywhere else two searches may take different ones of two codes that are equally
    near, to rounding. What is compared of its encoder are the latents before quantisation.
    """
    if artifact.config.kind != "vq":
        return _noise(2, artifact.config.latent_channels, 2, 3)
    codebook = full["quantizer.codebook"]
    chosen = torch.linspace(0, codebook.shape[0] - 1, 2 * 4 * 6).long()
    return artifact.statistics.normalize(codebook[chosen].view(2, 4, 6, -1).permute(0, 3, 1, 2))


def _their_autoencoder(
    folder: Path, artifact: Artifact, full: Mapping[str, Tensor], x: Tensor, z: Tensor
) -> dict[str, Tensor]:
    """Outputs by part, for these pixels and latents."""
    theirs = _open(autoencoder_class(artifact.config), folder)
    fill_theirs(theirs, artifact.state, full, autoencoder_names(artifact.config), artifact.statistics)
    scale = theirs.config.scaling_factor
    if artifact.config.kind == "vq":
        latents = theirs.encode(x).latents * scale
        return {"autoencoder's latents": latents, "autoencoder's pixels": theirs.decode(z / scale).sample}
    shift = theirs.config.shift_factor or 0.0
    posterior = theirs.encode(x).latent_dist
    return {
        "autoencoder's latents": (posterior.mode() - shift) * scale,
        "autoencoder's posterior": torch.cat([posterior.mean, posterior.logvar], dim=1),
        "autoencoder's pixels": theirs.decode(z / scale + shift).sample,
    }


def _our_autoencoder(artifact: Artifact, full: Mapping[str, Tensor], x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """As `_their_autoencoder`."""
    ours = _on_meta(lambda: build_autoencoder(artifact.config), full)
    ours.statistics = artifact.statistics
    outputs = {"autoencoder's latents": ours.encode(x), "autoencoder's pixels": ours.decode(z)}
    mean, logvar = ours.encode_moments(x)
    if logvar is None:
        return outputs
    if artifact.statistics.channel_mean:
        # Folded: their posterior is that of our latents.
        std = torch.tensor(artifact.statistics.channel_std).view(1, -1, 1, 1)
        mean, logvar = artifact.statistics.normalize(mean), logvar - 2 * std.log()
    return outputs | {"autoencoder's posterior": torch.cat([mean, logvar], dim=1)}


def _compare_unet(folder: Path, artifact: DiffusionArtifact) -> dict[str, float]:
    state, channels = unet_state(artifact.state), artifact.autoencoder.config.latent_channels
    text, full = require_text_alone(artifact.conditioning), filled(state)
    smallest = 2 ** (len(artifact.unet.channel_multipliers) - 1)
    z = _noise(2, channels, 2 * smallest, 3 * smallest)
    t = torch.tensor([1, artifact.diffusion.num_timesteps - 1])
    context = _noise(2, text.max_tokens, text.width)

    def theirs() -> Tensor:
        network = _open(UNet2DConditionModel, folder)
        fill_theirs(network, state, full, unet_names(artifact.unet))
        return network(z, t, context).sample  # type: ignore[no-any-return]

    def ours() -> Tensor:
        network = _on_meta(lambda: build_unet(artifact.unet, channels, channels, text.width), full)
        return network(z, t, context)  # type: ignore[no-any-return]

    return _differences({"UNet": theirs()}, {"UNet": ours()})


def _compare_text_encoder(folder: Path, text: TextConditioningConfig, artifact: DiffusionArtifact) -> dict[str, float]:
    state = conditioner_state(artifact.state)
    full = filled(state)
    tokens, _ = build_tokenizer(text)(CAPTIONS, text.max_tokens)

    def theirs() -> Tensor:
        network = _open(pipeline_of(text).text_model, folder)
        fill_theirs(network, state, full, text_encoder_names(text))
        return network(tokens)[0]  # type: ignore[no-any-return]

    def ours() -> Tensor:
        network = _on_meta(lambda: TextCondition(text), full)
        return network(network.tokens(CAPTIONS), (1, 1))  # type: ignore[no-any-return]

    return _differences({"text encoder": theirs()}, {"text encoder": ours()})


def _compare_tokens(folder: Path, text: TextConditioningConfig) -> None:
    tokenizer: Any = tokenizer_class(text).from_pretrained(folder)
    theirs = tokenizer(list(CAPTIONS), padding="max_length", truncation=True, return_tensors="pt").input_ids
    ours, _ = build_tokenizer(text)(CAPTIONS, text.max_tokens)
    if not torch.equal(theirs, ours):
        raise CheckpointError(
            f"the exported tokenizer gives {theirs.tolist()} where ours gives {ours.tolist()}, so nothing was written; "
            "this is a defect of ldm-scale: please report the version of transformers"
        )


def _translated_for(theirs: nn.Module, state: Mapping[str, Tensor], names: NameMap) -> LazyTensors:
    """`state` under the names that `theirs` has in memory."""
    own = theirs.state_dict()
    return loadable(translate(state, names, published(own, type(theirs)), type(theirs).__name__), own)


def _open(model_class: Any, folder: Path) -> Any:
    """The model in an exported folder, read as a stranger's program reads it, in evaluation mode."""
    return model_class.from_pretrained(folder).eval()


def _on_meta(build: Callable[[], ModuleT], state: Mapping[str, Tensor]) -> ModuleT:
    """The network that `build` returns, in evaluation mode, with no other weights than these."""
    with torch.device("meta"):
        network = build().eval()
    network.load_state_dict(state, assign=True)
    return network


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
