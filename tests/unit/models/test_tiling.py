"""Tiles are the whole image where nothing global is left out, blend at their seams, and stay near it otherwise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.errors import ConfigError
from ldm_scale.models import tiling
from ldm_scale.models.autoencoder import Autoencoder
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.models.fused import GroupNorm
from ldm_scale.models.tiling import decode_raw_tiled, encode_moments_tiled

KL = AutoencoderConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, norm_groups=4)
VQ = dataclasses.replace(KL, kind="vq", codebook_size=16)
WEIGHTS_SUM = 1e-6


def small(config: AutoencoderConfig = KL) -> Autoencoder:
    network = build_seeded(lambda: build_autoencoder(config), 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def with_fixed_norms(network: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> Autoencoder:
    """Every norm keeps its affine part and SiLU alone, which do not look beyond a pixel."""

    def affine(self: GroupNorm, x: Tensor, **options: object) -> Tensor:
        bias = self.bias if self.channel_bias is None else self.bias + self.channel_bias
        y = x * self.weight[:, None, None] + bias[:, None, None]
        return F.silu(y) if self.activation == "silu" else y

    monkeypatch.setattr(GroupNorm, "forward", affine)
    return network


def smooth(batch: int, height: int, width: int) -> Tensor:
    coarse = torch.rand(batch, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def difference(found: Tensor, whole: Tensor) -> float:
    return float((found - whole).norm() / whole.norm())


@pytest.mark.parametrize("overlap", [0, 16])
@pytest.mark.parametrize("size", [(64, 128), (150, 112), (128, 20)])
def test_with_fixed_norms_the_inside_of_a_tile_is_the_whole(
    size: tuple[int, int], overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = with_fixed_norms(small(dataclasses.replace(KL, mid_attention=False)), monkeypatch)
    x = smooth(1, *size)
    with torch.no_grad():
        mean, _ = network.encode_moments(x)
        pixels = network.decode_raw(mean)
    encoded = (encode_moments_tiled(network, x, 64, overlap, passes=0)[0] - mean).abs().amax(dim=(0, 1))
    decoded = (decode_raw_tiled(network, mean, 64, overlap, passes=0) - pixels).abs().amax(dim=(0, 1))
    # This network's convolutions reach 11 latents in the encoder and 14 pixels in the decoder.
    for error, scale, view in ((encoded, 1, 11), (decoded, 2, 14)):
        inside = far_from_edges(size[0] // 2, scale, view, overlap // 2)[:, None]
        inside = inside & far_from_edges(size[1] // 2, scale, view, overlap // 2)
        assert inside.sum() > 50
        assert error[inside].max() < 1e-5
        assert error[~inside].max() > 1e-4, "the edges are where the difference is"


def far_from_edges(size: int, scale: int, view: int, overlap: int) -> Tensor:
    """Which places are at least `view` from every inner edge of a tile. Shapes: (size * scale,)."""
    places, far = torch.arange(size * scale) + 0.5, torch.ones(size * scale, dtype=torch.bool)
    for span in tiling._spans(size, 32, overlap):
        for edge in {span.start, span.stop} - {0, size}:
            far &= (places - edge * scale).abs() >= view
    return far


def test_with_fixed_norms_an_overlap_of_twice_the_view_leaves_only_what_ramps_weigh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = with_fixed_norms(small(), monkeypatch)
    x = smooth(1, 128, 128)
    with torch.no_grad():
        mean, _ = network.encode_moments(x)
        pixels = network.decode_raw(mean)
    errors = [difference(decode_raw_tiled(network, mean, 64, overlap, passes=0), pixels) for overlap in (0, 16, 32)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("config", [KL, VQ, dataclasses.replace(KL, attention_levels=(1,))])
def test_an_image_of_one_tile_and_images_one_by_one_are_the_whole(config: AutoencoderConfig) -> None:
    network, x = small(config), smooth(3, 32, 24)
    with torch.no_grad():
        mean, logvar = network.encode_moments(x)
        found, found_logvar = encode_moments_tiled(network, x, tile=32)
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-5)
        assert (logvar is None) == (found_logvar is None)
        alone = torch.cat([network.decode_raw(mean[i : i + 1]) for i in range(3)])
        assert torch.equal(decode_raw_tiled(network, mean, tile=64), alone)
        torch.testing.assert_close(alone, network.decode_raw(mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [KL, VQ])
def test_statistics_of_all_tiles_bring_tiles_to_the_whole(config: AutoencoderConfig) -> None:
    network, x = small(config), smooth(2, 128, 96)
    with torch.no_grad():
        mean, _ = network.encode_moments(x)
        pixels = network.decode_raw(mean)
    encoded = [difference(encode_moments_tiled(network, x, 64, 32, passes=p)[0], mean) for p in (0, 1, 12)]
    decoded = [difference(decode_raw_tiled(network, mean, 64, 32, passes=p), pixels) for p in (0, 1, 12)]
    # Random weights amplify what little differs; trained ones come nearer (docs/decisions.md).
    assert encoded[1] < encoded[0] / 2
    assert decoded[1] < decoded[0]
    assert max(encoded[2], decoded[2]) < 0.05, "as many passes as norms follow each other: the whole's statistics"
    assert not any("forward" in vars(module) for module in network.modules()), "the norms are themselves again"


def test_moments_of_all_tiles_are_the_whole_images() -> None:
    norm = GroupNorm(4, 8, 1e-6)
    norm.channel_bias = nn.Parameter(torch.randn(8))
    x = torch.randn(1, 8, 26, 40) * 3 + 100
    plan = tiling.TilePlan(13, 20, 6, 2)
    moments = tiling._Moments()
    for row, column in plan:
        tiling._measure(norm, tiling._own_part(tiling._cut(x, row, column, 2), row, column), moments)
    groups = (x + norm.channel_bias[:, None, None]).detach().double().view(4, -1)
    assert moments.count == groups.shape[1]
    torch.testing.assert_close(torch.as_tensor(moments.mean).detach(), groups.mean(1), rtol=1e-6, atol=0)
    variance = torch.as_tensor(moments.squares).detach() / moments.count
    torch.testing.assert_close(variance, groups.var(1, correction=0), rtol=1e-4, atol=0)


def test_a_fixed_norm_with_the_whole_images_moments_is_the_norm() -> None:
    norm = small().decoder.levels[0][0].norm2  # type: ignore[index, union-attr]
    x = torch.randn(1, 8, 12, 12) + 0.5
    moments = tiling._Moments()
    with torch.no_grad():
        tiling._measure(norm, x, moments)  # type: ignore[arg-type]
        found = tiling._norm(norm, moments, None, lambda part: part, x)  # type: ignore[arg-type]
        torch.testing.assert_close(found, norm(x.clone()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(20, 8, 2), (21, 8, 6), (9, 8, 0), (17, 8, 7), (8, 8, 4), (5, 8, 4)]
)
def test_weights_add_up_to_one_and_own_parts_cover_once(size: int, tile: int, overlap: int) -> None:
    plan = tiling.TilePlan(size, size, tile, overlap)
    assert (plan.rows[0].start, plan.rows[-1].stop) == (0, size)
    total, owned = torch.zeros(3 * size), torch.zeros(size)
    for span in plan.rows:
        weights = plan.weights(plan.rows, span, 3)
        assert weights.min() > 0
        total[3 * span.start : 3 * span.stop] += weights
        assert span.start <= span.own_start < span.own_stop <= span.stop
        owned[span.own_start : span.own_stop] += 1
    assert torch.allclose(total, torch.ones(()), atol=WEIGHTS_SUM)
    assert torch.equal(owned, torch.ones(size))


def test_no_seam_is_seen_in_a_constant_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding's borders (a 1x1 kernel everywhere), tiles of a constant image are the same and blend to it."""
    network = with_fixed_norms(small(), monkeypatch)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                kept = module.weight[:, :, 1, 1].clone()
                module.weight.zero_()
                module.weight[:, :, 1, 1] = kept
    z = torch.full((1, 3, 30, 30), 0.3)
    pixels = decode_raw_tiled(network, z, tile=32, overlap=8, passes=0)
    assert (pixels - pixels[:, :, :1, :1]).abs().max() < 1e-5


@pytest.mark.parametrize("height", [32, 96])
def test_pixel_space_is_passed_through(height: int) -> None:
    network, x = Autoencoder(AutoencoderConfig(kind="identity", channel_multipliers=(1,))), smooth(2, height, 40)
    assert encode_moments_tiled(network, x, 32) == (x, None)
    assert torch.equal(decode_raw_tiled(network, x, 32), x)


def test_bfloat16_stays_bfloat16() -> None:
    network = small().bfloat16()
    x = smooth(1, 64, 64).bfloat16()
    mean, logvar = encode_moments_tiled(network, x, 32)
    assert logvar is not None
    assert (mean.dtype, logvar.dtype, decode_raw_tiled(network, mean, 32).dtype) == (torch.bfloat16,) * 3


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (33, None, r"^tile=33: must be a multiple of the downsampling factor 2; take 32$"),
        (0, None, r"^tile=0: .*take 2$"),
        (32, 32, r"^overlap=32: must be 0 or a multiple .* smaller than tile=32; take 8$"),
        (32, 7, r"^overlap=7: .* multiple of the downsampling factor 2"),
        (32, -2, r"^overlap=-2: "),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tile: int, overlap: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_moments_tiled(small(), smooth(1, 64, 64), tile, overlap)
    with pytest.raises(ConfigError, match=message):
        decode_raw_tiled(small(), torch.zeros(1, 3, 32, 32), tile, overlap)


def test_an_image_of_half_latents_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"an image of 65 x 64 pixels: .* factor 2; crop it to 64 x 64"):
        encode_moments_tiled(small(), smooth(1, 65, 64), 32)
