"""Sizes and forward FLOPs of the networks of a configuration, counted on the meta device.

Nothing is allocated and nothing runs: torch's counter sees the shapes of every convolution, matrix product and
attention of a real forward pass, so that a change of a network changes the count by itself. What it leaves out are
norms, activations and other element-wise work (below 1% of these networks), and the search of a VQ codebook. A
multiply-add is two FLOPs; papers that count MACs print half of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_scale.conditioning.build import build_conditioner
from ldm_scale.config.schema import AutoencoderConfig, Config
from ldm_scale.models.build import build_autoencoder, build_unet
from ldm_scale.models.discriminator import PatchDiscriminator


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
    unet: NetworkSize | None = None
    conditioner: NetworkSize | None = None

    @property
    def autoencoder(self) -> NetworkSize:
        """Encode and decode together."""
        return _sum(self.encoder, self.decoder)

    @property
    def trained(self) -> NetworkSize:
        """The run's headline: the autoencoder's numbers; or the UNet's FLOPs, and the UNet's and tau_theta's weights.

        Discriminator, perceptual net and EMA are never part of them.
        """
        if self.unet is None or self.conditioner is None:
            return self.autoencoder
        return NetworkSize(self.unet.parameters + self.conditioner.parameters, self.unet.forward_flops)


def measure_run(config: Config) -> RunSize:
    """Sizes of all networks that `config` trains or needs, at its resolution; no artifact or data is opened."""
    resolution = config.data.resolution
    encoder, decoder, latent_shape = _measure_autoencoder(config.autoencoder, resolution)
    if config.stage == "autoencoder":
        loss = config.autoencoder_loss
        discriminator = None
        if loss.adversarial_weight > 0:
            with torch.device("meta"):
                network = PatchDiscriminator(loss.discriminator_base_channels, loss.discriminator_layers)
            discriminator = _measure(network, network, _meta(1, 3, resolution, resolution))
        return RunSize(latent_shape, encoder, decoder, discriminator=discriminator)
    with torch.device("meta"):
        unet = build_unet(config.unet, latent_shape[0], latent_shape[0], config.conditioning.width)
        conditioner = build_conditioner(config.conditioning)
    text = config.conditioning
    return RunSize(
        latent_shape,
        encoder,
        decoder,
        unet=_measure(unet, unet, _meta(1, *latent_shape), _meta(1), _meta(1, text.max_tokens, text.width)),
        conditioner=_measure(conditioner, conditioner, _meta(1, text.max_tokens, dtype=torch.long)),
    )


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


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sum(first: NetworkSize, second: NetworkSize) -> NetworkSize:
    return NetworkSize(first.parameters + second.parameters, first.forward_flops + second.forward_flops)
