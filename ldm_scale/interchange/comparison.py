"""Whether two models in memory compute the same: their networks on fixed inputs.

Layers that start at zero (and would hide everything before them in an untrained model) hold the same fixed random
values in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm_scale.conditioning.base import Conditioned, Inputs
from ldm_scale.conditioning.build import build_conditioner
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion, with_spatial
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.safetensors_io import passing
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics

TOLERANCE = 1e-4  # of the outputs' relative difference, in float32
ZERO_REPLACEMENT_STD = 0.02

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def differences(theirs: Artifact | DiffusionArtifact, ours: Artifact | DiffusionArtifact) -> dict[str, float]:
    """|theirs - ours| / |ours| of every part; of autoencoders alone in raw latents, which have no statistics.

    Raises: CheckpointError if one exceeds TOLERANCE.
    """
    if isinstance(theirs, Artifact) or isinstance(ours, Artifact):
        assert isinstance(theirs, Artifact), "models of one stage"
        assert isinstance(ours, Artifact), "models of one stage"
        found = _compare_autoencoders(theirs, ours, statistics=False)
    else:
        found = _compare_autoencoders(theirs.autoencoder, ours.autoencoder, statistics=True)
        found |= _compare_diffusion(theirs, ours)
    require_small(found)
    return found


def require_small(found: Mapping[str, float]) -> None:
    """Nothing, if no difference exceeds TOLERANCE.

    Raises: CheckpointError that names the part.
    """
    for part, difference in found.items():
        # Written so that a NaN fails too.
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"the {part} read back differs by {difference:.2e} of its norm (allowed {TOLERANCE:.0e}), so nothing "
                "was written; weights that are not finite give this, anything else is a defect of ldm-scale: please "
                "report the configuration"
            )


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    """|theirs - ours| / |ours|."""
    assert theirs.shape == ours.shape, f"{theirs.shape} and {ours.shape} cannot be compared"
    return float((theirs.double() - ours.double()).norm() / ours.double().norm())


def _compare_autoencoders(theirs: Artifact, ours: Artifact, *, statistics: bool) -> dict[str, float]:
    if ours.config.kind == "identity":
        return {}
    f, channels = ours.config.downsampling_factor, ours.config.latent_channels
    x, noise, z = _noise(2, 3, 2 * f, 3 * f).clamp(-1, 1), _noise(2, channels, 2, 3), _noise(2, channels, 4, 6)
    if ours.config.kind == "vq":
        # Latents that lie on codes: elsewhere rounding may choose another of two that are equally near.
        codebook = ours.state["quantizer.codebook"]
        numbers = torch.linspace(0, codebook.shape[0] - 1, 2 * 4 * 6).long()
        z = codebook[numbers].view(2, 4, 6, -1).permute(0, 3, 1, 2)
        z = ours.statistics.normalize(z) if statistics else z

    def outputs(artifact: Artifact) -> dict[str, Tensor]:
        network = _loaded(lambda: Autoencoder(artifact.config), artifact.state)
        network.statistics = artifact.statistics if statistics else LatentStatistics()
        return {
            "autoencoder's latents": network.encode(x),
            "autoencoder's sampled latents": network.encode(x, noise),
            "autoencoder's pixels": network.decode(z),
        }

    return _relative(outputs(theirs), outputs(ours))


def _compare_diffusion(theirs: DiffusionArtifact, ours: DiffusionArtifact) -> dict[str, float]:
    channels = ours.autoencoder.config.latent_channels
    smallest = 2 ** (len(ours.unet.channel_multipliers) - 1)
    size = (2 * smallest, 3 * smallest)
    z, t = _noise(2, channels, *size), torch.tensor([1, ours.diffusion.num_timesteps - 1])
    inputs = _inputs(ours, size)

    def outputs(artifact: DiffusionArtifact) -> dict[str, Tensor]:
        network = _loaded(lambda: LatentDiffusion(artifact.unet, artifact.conditioning, channels), artifact.state)
        conditioned: Conditioned = network.conditioner(inputs, size)
        found = {"context conditioning": conditioned.context, "spatial conditioning": conditioned.spatial}
        found["UNet"] = network.unet(with_spatial(z, conditioned), t, conditioned.context)
        return {part: output for part, output in found.items() if output is not None}

    return _relative(outputs(theirs), outputs(ours))


def _inputs(artifact: DiffusionArtifact, size: tuple[int, int]) -> Inputs:
    """Fixed inputs of the kinds of conditioning: noise, or numbers that all exist."""
    with torch.device("meta"):
        conditioner = build_conditioner(artifact.conditioning, artifact.autoencoder.config.latent_channels)
    inputs = {}
    for name, example in conditioner.example(2, size).items():
        if example.is_floating_point():
            inputs[name] = _noise(*example.shape)
            continue
        tables = [module for module in conditioner[name].modules() if isinstance(module, nn.Embedding)]
        bound = min(table.num_embeddings for table in tables) - 1
        numbers = torch.arange(example.numel()) * 7919 % max(bound, 1)
        inputs[name] = numbers.view(example.shape).to(example.dtype)
    return inputs


def _loaded(build: Callable[[], ModuleT], state: Mapping[str, Tensor]) -> ModuleT:
    """The network with these weights, zeros replaced. It ends with its last output: one at a time is in memory."""
    generator = torch.Generator().manual_seed(0)
    filled = {
        name: tensor if tensor.any() else torch.randn(tensor.shape, generator=generator) * ZERO_REPLACEMENT_STD
        for name, tensor in passing(state, "loading", sorted(state))  # the same draws for both
    }
    with torch.device("meta"):
        network = build()
    network.load_state_dict(filled, assign=True)
    return network.eval()


def _relative(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, float]:
    return {part: relative_difference(theirs[part], output) for part, output in ours.items()}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
