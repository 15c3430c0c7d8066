"""Sizes and forward FLOPs of the networks of a configuration, counted on the meta device.

Nothing is allocated and nothing runs: torch's counter sees the shapes of every convolution, matrix product and
attention of a real forward pass, so that a change of a network changes the count by itself. What it leaves out are
norms, activations and other element-wise work (below 1% of these networks), and the search of a VQ codebook. A
multiply-add is two FLOPs; papers that count MACs print half of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_scale.conditioning.build import build_conditioner
from ldm_scale.config.schema import AutoencoderConfig, Config
from ldm_scale.models.build import build_autoencoder, build_unet
from ldm_scale.models.classifier import LatentClassifier
from ldm_scale.models.discriminator import PatchDiscriminator

# forward = 1, gradients of activations and of weights 1 each
STEP_FLOPS_PER_FORWARD = 3


@dataclass(frozen=True)
class NetworkSize:
    """One network's parameters and the FLOPs of its forward pass for one image."""

    parameters: int
    forward_flops: int


@dataclass(frozen=True)
class RunSize:
    """The networks of a run. Those that its stage does not have are None."""

    latent_shape: tuple[int, int, int]  # (c, H/f, W/f) of one image
    encoder: NetworkSize  # of the autoencoder, its 1x1 convolution to the moments included
    decoder: NetworkSize  # its 1x1 convolution and the codebook of a VQ autoencoder included
    discriminator: NetworkSize | None = None
    classifier: NetworkSize | None = None
    unet: NetworkSize | None = None
    # tau_theta's parts by section, with the weights that are trained: frozen_text's network is not among them.
    conditioner: dict[str, NetworkSize] = field(default_factory=dict)

    @property
    def autoencoder(self) -> NetworkSize:
        """Encode and decode together."""
        return _sum([self.encoder, self.decoder])

    @property
    def tau_theta(self) -> NetworkSize | None:
        """All of the conditioner; None where there is no UNet."""
        return None if self.unet is None else _sum(self.conditioner.values())

    @property
    def trained(self) -> NetworkSize:
        """The run's headline: the autoencoder's or the classifier's numbers; or the UNet's FLOPs, and the UNet's and
        tau_theta's weights.

        Discriminator, perceptual net, frozen text encoder and EMA are never part of them.
        """
        if self.unet is not None:
            weights = _sum([self.unet, *self.conditioner.values()]).parameters
            return NetworkSize(weights, self.unet.forward_flops)
        return self.autoencoder if self.classifier is None else self.classifier

    @property
    def trained_forward_flops(self) -> int:
        """FLOPs of one image through what a step trains, tau_theta included."""
        return self.trained.forward_flops + (0 if self.tau_theta is None else self.tau_theta.forward_flops)

    @property
    def step_flops(self) -> int:
        """FLOPs that training takes an image: those through what is trained, forward and backward.

        Neither frozen networks and discriminators nor what activation checkpointing computes again.
        """
        return STEP_FLOPS_PER_FORWARD * self.trained_forward_flops


def measure_run(config: Config) -> RunSize:
    """Sizes of all networks that `config` trains or needs, at its resolution; no artifact or data is opened."""
    resolution = config.data.resolution
    encoder, decoder, latent_shape = _measure_autoencoder(config.autoencoder, resolution)
    if config.stage == "autoencoder":
        return RunSize(latent_shape, encoder, decoder, discriminator=_measure_discriminator(config))
    if config.stage == "classifier":
        classifier = _measure_classifier(config, latent_shape)
        return RunSize(latent_shape, encoder, decoder, classifier=classifier)
    unet, conditioner = _measure_diffusion(config, latent_shape)
    return RunSize(latent_shape, encoder, decoder, unet=unet, conditioner=conditioner)


def _measure_discriminator(config: Config) -> NetworkSize | None:
    loss, resolution = config.autoencoder_loss, config.data.resolution
    if loss.adversarial_weight == 0:
        return None
    with torch.device("meta"):
        network = PatchDiscriminator(loss.discriminator_base_channels, loss.discriminator_layers)
    return _measure(network, network, _meta(1, 3, resolution, resolution))


def _measure_classifier(config: Config, latent_shape: tuple[int, int, int]) -> NetworkSize:
    with torch.device("meta"):
        network = LatentClassifier(config.unet, config.classifier, latent_shape[0])
    return _measure(network, network, _meta(1, *latent_shape), _meta(1))


def _measure_diffusion(
    config: Config, latent_shape: tuple[int, int, int]
) -> tuple[NetworkSize, dict[str, NetworkSize]]:
    """The UNet, and the parts of tau_theta."""
    channels, height, width = latent_shape
    with torch.device("meta"):
        conditioner = build_conditioner(config.conditioning, channels)
        unet = build_unet(config.unet, channels + conditioner.spatial_channels, channels, conditioner.context_dim)
        inputs = {name: part.example(1, (height, width)) for name, part in conditioner.conditions.items()}
        context = conditioner(inputs, (height, width)).context
    z = _meta(1, channels + conditioner.spatial_channels, height, width)
    parts = {
        name: _measure(part, partial(part, inputs[name], (height, width)))
        for name, part in conditioner.conditions.items()
    }
    return _measure(unet, unet, z, _meta(1), *([] if context is None else [context])), parts


def _measure_autoencoder(
    config: AutoencoderConfig, resolution: int
) -> tuple[NetworkSize, NetworkSize, tuple[int, int, int]]:
    """Encoder, decoder and the shape of one image's latents."""
    with torch.device("meta"):
        autoencoder = build_autoencoder(config)
    side = resolution // config.downsampling_factor
    latent_shape = (config.latent_channels, side, side)
    if config.kind == "identity":
        return NetworkSize(0, 0), NetworkSize(0, 0), latent_shape
    encoder = _measure(
        nn.ModuleList([autoencoder.encoder, autoencoder.quant_conv]),
        autoencoder.encode_moments,
        _meta(1, 3, resolution, resolution),
    )
    # The codes belong to the decoder, their search is left out of its FLOPs as it is in published counts: 2 |Z| c per
    # latent, below 1% of the decoder's.
    codebook = 0 if autoencoder.quantizer is None else autoencoder.quantizer.codebook.numel()
    autoencoder.quantizer = None
    decoder = _measure(
        nn.ModuleList([autoencoder.decoder, autoencoder.post_quant_conv]),
        autoencoder.decode_raw,
        _meta(1, *latent_shape),
    )
    return encoder, NetworkSize(decoder.parameters + codebook, decoder.forward_flops), latent_shape


def _measure(network: nn.Module, forward: Callable[..., object], *inputs: Tensor) -> NetworkSize:
    """Parameters of `network` and FLOPs of `forward(*inputs)`."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        forward(*inputs)
    return NetworkSize(parameters, counter.get_total_flops())


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _sum(sizes: Iterable[NetworkSize]) -> NetworkSize:
    all_sizes = list(sizes)
    return NetworkSize(sum(size.parameters for size in all_sizes), sum(size.forward_flops for size in all_sizes))
