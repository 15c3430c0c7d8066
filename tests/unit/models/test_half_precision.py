"""The probe finds values that float16 cannot hold, says where, and leaves the network as it was."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from ldm_scale.config.convert import config_to_dict, section_from_dict
from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.models.autoencoder import Autoencoder
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.models.half_precision import (
    FP16_MAX,
    MARGIN,
    TOLERANCE,
    HalfPrecisionProbe,
    merge,
    probe_half_precision,
)

KL = AutoencoderConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, norm_groups=4)
VQ = dataclasses.replace(KL, kind="vq", codebook_size=16)


def small(config: AutoencoderConfig = KL) -> Autoencoder:
    return build_seeded(lambda: build_autoencoder(config), 0).eval()


def images(number: int = 4) -> Tensor:
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def with_overflow_in_a_block() -> Autoencoder:
    """Features a hundred thousand times too large, which the norm behind them undoes."""
    network = small()
    block = network.decoder.middle.block1
    with torch.no_grad():
        block.conv1.weight.mul_(1e5)
        block.norm2.channel_bias.mul_(1e5)
    return network


@pytest.mark.parametrize("config", [KL, VQ, dataclasses.replace(KL, mid_attention=False)])
def test_a_fresh_network_is_safe(config: AutoencoderConfig) -> None:
    probe = probe_half_precision(small(config), images().split(2))
    assert probe.fp16_safe
    assert 0.5 < probe.max_activation < 100
    assert (probe.num_images, probe.margin) == (4, MARGIN)
    assert probe.fp16_difference is None, "a CPU is not asked for float16"


def test_the_largest_value_is_the_one_that_a_plain_forward_meets() -> None:
    network = small()
    with torch.no_grad():
        network.encoder.conv_in.weight.mul_(50)
        network.encoder.levels[0][0].conv2.weight.zero_()
        network.encoder.levels[0][0].conv2.bias.fill_(-3e4)
        sums = network.encoder.levels[0][0](network.encoder.conv_in(images()))
    probe = probe_half_precision(network, [images()[:1], images()[1:]])
    assert probe.module == "encoder.levels.0.0", "the sum is larger than either of what is added"
    assert probe.max_activation == pytest.approx(sums.abs().max().item(), rel=1e-6)
    assert 3e4 < probe.max_activation < FP16_MAX / MARGIN
    assert probe.fp16_safe
    with torch.no_grad():
        network.encoder.levels[0][0].conv2.bias.fill_(-FP16_MAX / MARGIN)
    assert not probe_half_precision(network, [images()]).fp16_safe, "held by float16, but without the margin"


def test_an_overflow_that_float32_hides_is_found_where_it_is() -> None:
    network, planted = small(), with_overflow_in_a_block()
    with torch.no_grad():
        z = network.encode_moments(images())[0]
        expected, pixels = network.decode_raw(z), planted.decode_raw(z)
        torch.testing.assert_close(pixels, expected, rtol=1e-3, atol=1e-3)
        assert not planted.half().decode_raw(z.half()).isfinite().all(), "float16 does overflow here"
    probe = probe_half_precision(planted.float(), [images()])
    assert not probe.fp16_safe
    assert probe.max_activation > FP16_MAX
    assert probe.module == "decoder.middle.block1.conv1"


def test_a_bias_that_the_norm_adds_is_looked_at() -> None:
    network = small()
    with torch.no_grad():
        network.decoder.levels[1][0].norm2.channel_bias[3] = -2 * FP16_MAX
    probe = probe_half_precision(network, [images()])
    assert (probe.fp16_safe, probe.module) == (False, "decoder.levels.1.0.norm2 (input)")


def test_scores_of_the_attention_are_looked_at() -> None:
    network = small()
    attention = network.encoder.middle.attention
    assert attention is not None
    with torch.no_grad():
        attention.attention.to_qkv.weight[:32].mul_(1e3)
    probe = probe_half_precision(network, [images()])
    assert probe.module == "encoder.middle.attention.attention.attention (scores)"
    assert not probe.fp16_safe


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_unsafe_and_fit_into_json(value: float) -> None:
    network = small()
    with torch.no_grad():
        network.decoder.upsamples[0].conv.bias[0] = value
    probe = probe_half_precision(network, [images()])
    assert not probe.fp16_safe
    assert probe.module == "decoder.upsamples.0.conv"
    text = json.dumps(config_to_dict(probe), allow_nan=False)
    assert section_from_dict(HalfPrecisionProbe, json.loads(text)) == probe


def test_no_hook_and_no_gradient_is_left_behind() -> None:
    network = small()
    with pytest.raises(RuntimeError, match="channels"):
        probe_half_precision(network, [images(), torch.zeros(1, 4, 16, 16)])
    probe_half_precision(network, [images()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_bfloat16_weights_are_probed_in_their_own_range() -> None:
    probe = probe_half_precision(with_overflow_in_a_block().bfloat16(), [images()])
    assert not probe.fp16_safe
    assert probe.module == "decoder.middle.block1.conv1"


def test_pixels_as_latents_are_safe() -> None:
    probe = probe_half_precision(Autoencoder(AutoencoderConfig(kind="identity")), [images()])
    assert probe.fp16_safe
    assert (probe.max_activation, probe.module) == (pytest.approx(images().abs().max().item()), "pixels")


def test_probes_of_ranks_become_one() -> None:
    none = probe_half_precision(small(), [])
    assert (none.fp16_safe, none.num_images) == (False, 0), "nothing was looked at"
    network = small()
    both = probe_half_precision(network, [images()])
    parts = [probe_half_precision(network, [part]) for part in (images()[:1], images()[1:])]
    assert merge(merge(none, parts[0]), parts[1]) == both
    unsafe = probe_half_precision(with_overflow_in_a_block(), [images()])
    assert merge(both, unsafe) == merge(unsafe, both) == dataclasses.replace(unsafe, num_images=8)
    far = dataclasses.replace(both, fp16_difference=2 * TOLERANCE)
    assert not merge(both, far).fp16_safe
    assert merge(dataclasses.replace(both, fp16_difference=TOLERANCE / 2), both).fp16_safe


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [KL, VQ])
def test_a_gpu_compares_what_float16_computes(config: AutoencoderConfig) -> None:
    probe = probe_half_precision(small(config).cuda(), [images()])
    assert probe.fp16_safe
    assert probe.fp16_difference is not None
    assert 0 < probe.fp16_difference < TOLERANCE
