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
from torch import Tensor, nn

from ldm_scale.conditioning.frozen_text import FrozenTextEncoder
from ldm_scale.conditioning.text import TextCondition
from ldm_scale.conditioning.tokenizers import build_tokenizer
from ldm_scale.config.schema import FrozenTextConditioningConfig, TextConditioningConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, deferred
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.comparison import ZERO_REPLACEMENT_STD, relative_difference, require_small
from ldm_scale.interchange.diffusers import (
    CONDITIONER_WEIGHTS,
    exported_unet_state,
    other_state,
    text_part,
    unet_inputs,
    unet_state,
)
from ldm_scale.interchange.diffusers_autoencoder import autoencoder_class
from ldm_scale.interchange.diffusers_layout import CONDITIONER, Layout, layout_of
from ldm_scale.interchange.diffusers_scheduler import require_our_schedule
from ldm_scale.interchange.diffusers_unet import unet_class
from ldm_scale.interchange.folding import fold
from ldm_scale.interchange.name_maps import NameMap, autoencoder_names, text_encoder_names, translate, unet_names
from ldm_scale.interchange.safetensors_io import passing, read_tensors, tensors_sha256
from ldm_scale.interchange.text_encoder import loadable, published, text_model_class, tokenizer_class
from ldm_scale.models.build import build_autoencoder, build_unet

_CONTEXT_TOKENS = 7
CAPTIONS = ("", "a red apple on a white plate", "Grinning Face", "flag: Cote d'Ivoire, 3 stars")

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Exported = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def measure_differences(folder: Path, artifact: Artifact | DiffusionArtifact) -> dict[str, float]:
    """|theirs - ours| / |ours| of every part of an exported folder.

    Raises: CheckpointError if one exceeds TOLERANCE, or a tensor or token is not ours.
    """
    with torch.no_grad():
        if isinstance(artifact, Artifact):
            differences = _compare_autoencoder(folder, artifact)
        else:
            differences = _compare_diffusion(folder, artifact)
    require_small(differences)
    return differences


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
    exported: Exported | None = None,
) -> None:
    """Nothing; the network, as it was opened, holds `state`, and from now on `full`, which is `filled(state)`.

    Theirs holds them as `exported` changes them: with latent statistics folded in, for example.
    Raises: CheckpointError if what was opened is not exactly what was to be written.
    """
    change = exported or _unchanged
    own, tensors = theirs.state_dict(), _translated_for(theirs, change(state), names)
    for name, tensor in passing(tensors, f"comparing {type(theirs).__name__}"):
        if not torch.equal(own[name], tensor):
            raise CheckpointError(
                f"{type(theirs).__name__}: {name} is read back with other values than were written, so nothing was "
                "written; is the disk sound?"
            )
    if full is not state:
        for name, tensor in _translated_for(theirs, change(full), names).items():
            if not torch.equal(own[name], tensor):
                own[name].copy_(tensor)


def _unchanged(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return state


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
    names = autoencoder_names(artifact.config)
    fill_theirs(theirs, artifact.state, full, names, lambda state: fold(state, artifact.statistics))
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


def _compare_diffusion(folder: Path, artifact: DiffusionArtifact) -> dict[str, float]:
    layout = layout_of(artifact)
    text, text_state = text_part(artifact, layout)
    frozen = artifact.conditioning.frozen_text
    differences: dict[str, float] = {}
    if layout.autoencoder is not None:
        differences |= _compare_autoencoder(folder / layout.autoencoder, artifact.autoencoder)
    if text is not None and layout.text_encoder is not None:
        _compare_tokens(folder / "tokenizer", text)
        differences |= _compare_text_encoder(folder / layout.text_encoder, text, text_state)
        if frozen is not None:
            differences |= _compare_tower(folder, layout.text_encoder, text, frozen)
    differences |= _compare_unet(folder / "unet", artifact, layout)
    require_our_schedule(folder / "scheduler", artifact.diffusion)
    others = other_state(artifact.state)
    if others and tensors_sha256(read_tensors(folder / CONDITIONER / CONDITIONER_WEIGHTS)) != tensors_sha256(others):
        raise CheckpointError(
            f"{folder / CONDITIONER} is read back with other values than were written; is the disk sound?"
        )
    return differences


def _compare_unet(folder: Path, artifact: DiffusionArtifact, layout: Layout) -> dict[str, float]:
    state, channels = unet_state(artifact.state), artifact.autoencoder.config.latent_channels
    full = filled(state)
    spatial_channels, width = unet_inputs(artifact)
    smallest = 2 ** (len(artifact.unet.channel_multipliers) - 1)
    x = _noise(2, channels + spatial_channels, 2 * smallest, 3 * smallest)
    t = torch.tensor([1, artifact.diffusion.num_timesteps - 1])
    context = () if width is None else (_noise(2, _CONTEXT_TOKENS, width),)

    def theirs() -> Tensor:
        network = _open(unet_class(artifact.unet), folder)
        names = unet_names(artifact.unet)
        fill_theirs(network, state, full, names, lambda tensors: exported_unet_state(tensors, artifact, layout))
        return network(x, t, *context).sample  # type: ignore[no-any-return]

    def ours() -> Tensor:
        network = _on_meta(lambda: build_unet(artifact.unet, channels + spatial_channels, channels, width), full)
        z, others = x[:, :channels], x[:, channels:]
        if layout.swaps_mask:
            others = torch.cat([others[:, 1:], others[:, :1]], dim=1)
        output: Tensor = network(torch.cat([z, others], dim=1), t, *context)
        return output

    return _differences({"UNet": theirs()}, {"UNet": ours()})


def _compare_text_encoder(folder: Path, text: TextConditioningConfig, state: Mapping[str, Tensor]) -> dict[str, float]:
    full = filled(state)
    tokens, _ = build_tokenizer(text)(CAPTIONS, text.max_tokens)

    def theirs() -> Tensor:
        network = _open(text_model_class(text), folder)
        fill_theirs(network, state, full, text_encoder_names(text))
        return network(tokens)[0]  # type: ignore[no-any-return]

    def ours() -> Tensor:
        network = _on_meta(lambda: TextCondition(text), full)
        context: Tensor = network(network.tokens(CAPTIONS), (1, 1))
        return context

    return _differences({"text encoder": theirs()}, {"text encoder": ours()})


def _compare_tower(
    folder: Path, part: str, text: TextConditioningConfig, frozen: FrozenTextConditioningConfig
) -> dict[str, float]:
    """Contexts of captions from their tokenizer and text encoder, and from OpenCLIP's."""
    tokenizer: Any = tokenizer_class(text).from_pretrained(folder / "tokenizer")
    tokens = tokenizer(list(CAPTIONS), padding="max_length", truncation=True, return_tensors="pt").input_ids
    theirs = _open(text_model_class(text), folder / part)(tokens)[0]
    return {"text encoder, to OpenCLIP": relative_difference(theirs, FrozenTextEncoder(frozen)(CAPTIONS))}


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
