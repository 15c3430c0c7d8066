"""VQ and identity autoencoders: nearest codes, the straight-through gradient, what is a latent and what is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.models.autoencoder import Autoencoder, AutoencoderOutput, LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.models.quantizer import Quantizer
from tests.helpers.runs import AUTOENCODER

VQ = dataclasses.replace(AUTOENCODER, kind="vq", codebook_size=16)
IDENTITY = AutoencoderConfig(kind="identity", channel_multipliers=(1,), latent_channels=3)


@pytest.fixture
def autoencoder() -> Autoencoder:
    network = build_seeded(lambda: build_autoencoder(VQ), 4)
    assert network.quantizer is not None
    torch.nn.init.normal_(network.quantizer.codebook, generator=torch.Generator().manual_seed(1))
    return network


def test_every_latent_gets_its_nearest_code() -> None:
    quantizer = Quantizer(20, 3)
    torch.nn.init.normal_(quantizer.codebook)
    z = torch.randn(2, 3, 4, 5)
    codes, indices = quantizer(z)
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 3).double(), quantizer.codebook.double())
    assert torch.equal(indices.flatten(), distances.argmin(dim=1))
    assert torch.equal(codes, quantizer.codebook[indices].permute(0, 3, 1, 2))


def test_codes_start_within_the_bounds_of_vqgan() -> None:
    codebook = Quantizer(50, 4).codebook.detach()
    assert 0.015 < codebook.abs().max() <= 1 / 50


def test_raw_latents_are_those_before_quantisation_and_decoding_puts_them_on_codes(autoencoder: Autoencoder) -> None:
    assert autoencoder.quantizer is not None
    x = torch.randn(2, 3, 8, 8)
    z_raw, logvar = autoencoder.encode_moments(x)
    assert logvar is None
    assert z_raw.shape == (2, 3, 4, 4)
    codes, _ = autoencoder.quantizer(z_raw)
    assert not torch.allclose(z_raw, codes, atol=1e-3)
    torch.testing.assert_close(autoencoder.encode(x), z_raw)
    torch.testing.assert_close(autoencoder.encode(x, torch.randn_like(z_raw)), z_raw, msg="a point has no noise")
    torch.testing.assert_close(autoencoder.decode(z_raw), autoencoder.decode_raw(codes))
    output = AutoencoderOutput(*autoencoder(x, torch.zeros_like(z_raw)))
    torch.testing.assert_close(output.reconstruction, autoencoder.decode_raw(z_raw), rtol=1e-5, atol=1e-6)


def test_the_reconstructions_gradient_passes_straight_through_to_the_encoder(autoencoder: Autoencoder) -> None:
    assert autoencoder.quantizer is not None
    x = torch.randn(2, 3, 8, 8)
    output = AutoencoderOutput(*autoencoder(x, torch.zeros(2, 3, 4, 4)))
    weight = torch.randn_like(output.reconstruction)
    (at_latents,) = torch.autograd.grad((output.reconstruction * weight).sum(), output.mean, retain_graph=True)
    assert output.codes is not None
    codes = output.codes.detach().requires_grad_()
    pixels = autoencoder.decoder.conv_out(autoencoder.decoder.features(autoencoder.post_quant_conv(codes)))
    (at_codes,) = torch.autograd.grad((pixels * weight).sum(), codes)
    torch.testing.assert_close(at_latents, at_codes, rtol=1e-4, atol=1e-6)
    assert at_latents.abs().max() > 0
    codebook = autoencoder.quantizer.codebook
    (of_codebook,) = torch.autograd.grad((output.reconstruction * weight).sum(), codebook, allow_unused=True)
    assert of_codebook is None, "reconstruction moves latents, not codes"


def test_the_codes_of_a_pass_have_a_gradient_to_the_codebook_alone(autoencoder: Autoencoder) -> None:
    assert autoencoder.quantizer is not None
    output = AutoencoderOutput(*autoencoder(torch.randn(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)))
    assert output.codes is not None
    of_codebook, of_latents = torch.autograd.grad(
        output.codes.sum(), (autoencoder.quantizer.codebook, output.mean), allow_unused=True
    )
    assert of_latents is None
    assert output.indices is not None
    counts = torch.bincount(output.indices.flatten(), minlength=16).float()
    torch.testing.assert_close(of_codebook, counts[:, None].expand(16, 3))


def test_the_identitys_latents_are_the_pixels() -> None:
    network = build_autoencoder(IDENTITY)
    assert list(network.state_dict()) == []
    assert IDENTITY.downsampling_factor == 1
    x = torch.randn(2, 3, 6, 10)
    assert torch.equal(network.encode(x), x)
    assert torch.equal(network.decode(x), x)
    network.statistics = LatentStatistics(scale=2.0)
    torch.testing.assert_close(network.decode(network.encode(x)), x)
