"""Our networks have the published sizes: parameters and FLOPs counted on the meta device.

Stable Diffusion 1.x and 2.x at 512 px with 77 tokens, and the first stages of arXiv:2112.10752, Table 8. The GFLOP were
counted independently from the original projects' configurations; the parameters are those of the released models
(in millions: UNets 859.52 and 865.91, KL-f8 83.65, KL-f4 55.31, the three-layer PatchGAN 2.77).
"""

from __future__ import annotations

import json

import pytest

from ldm_scale.config.compose import load_config
from ldm_scale.plan import main, plan_dict, plan_table
from ldm_scale.planning.flops import measure_run

FLOPS_TOLERANCE = 0.005


@pytest.mark.parametrize(
    ("experiment", "unet_parameters", "text_parameters", "unet_gflop", "text_gflop"),
    [("sd1", 859_520_964, 123_060_480, 803.3, 13.3), ("sd2", 865_910_724, 340_387_840, 804.3, 45.1)],
)
def test_stable_diffusion(
    experiment: str, unet_parameters: int, text_parameters: int, unet_gflop: float, text_gflop: float
) -> None:
    size = measure_run(load_config([f"experiment={experiment}"]))
    assert size.unet is not None
    assert size.conditioner is not None
    assert size.latent_shape == (4, 64, 64)
    assert size.unet.parameters == unet_parameters
    assert size.conditioner.parameters == text_parameters
    assert size.unet.forward_flops / 1e9 == pytest.approx(unet_gflop, rel=FLOPS_TOLERANCE)
    assert size.conditioner.forward_flops / 1e9 == pytest.approx(text_gflop, rel=FLOPS_TOLERANCE)
    assert size.trained.parameters == size.unet.parameters + size.conditioner.parameters
    assert size.trained.forward_flops == size.unet.forward_flops


@pytest.mark.parametrize(
    ("experiment", "resolution", "unet_gflop"),
    [("sd1", 256, 180.1), ("sd1", 768, 2148.0), ("sd2", 256, 181.1), ("sd2", 768, 2149.0)],
)
def test_stable_diffusion_at_other_resolutions(experiment: str, resolution: int, unet_gflop: float) -> None:
    # Attention grows with the square of the area: a count without it fits one resolution at most.
    size = measure_run(load_config([f"experiment={experiment}", f"data.resolution={resolution}"]))
    assert size.unet is not None
    assert size.unet.forward_flops / 1e9 == pytest.approx(unet_gflop, rel=FLOPS_TOLERANCE)


@pytest.mark.parametrize(
    ("experiment", "resolution", "parameters", "encode_gflop", "decode_gflop"),
    [
        ("kl_f8", 512, 83_653_863, 1116.7, 2514.5),
        ("kl_f8", 256, 83_653_863, 272.7, 622.2),
        ("kl_f4", 512, 55_312_063, 1793.7, 3094.6),
        ("kl_f4", 256, 55_312_063, 345.4, 670.6),
    ],
)
def test_first_stages(
    experiment: str, resolution: int, parameters: int, encode_gflop: float, decode_gflop: float
) -> None:
    size = measure_run(load_config([f"experiment={experiment}", f"data.resolution={resolution}"]))
    assert size.trained.parameters == parameters
    assert size.encoder.forward_flops / 1e9 == pytest.approx(encode_gflop, rel=FLOPS_TOLERANCE)
    assert size.decoder.forward_flops / 1e9 == pytest.approx(decode_gflop, rel=FLOPS_TOLERANCE)
    assert size.trained.forward_flops == size.encoder.forward_flops + size.decoder.forward_flops
    assert size.discriminator is not None
    assert size.discriminator.parameters == 2_765_633


@pytest.mark.parametrize(
    ("experiment", "encoder", "decoder", "encode_gflop", "decode_gflop"),
    [
        ("kl_f16", 28_266_816, 41_344_147, 137.87, 252.15),
        ("kl_f16_c8", 28_192_288, 41_307_083, 137.83, 252.13),
        ("kl_f32", 42_631_168, 61_248_963, 135.51, 251.44),
        ("kl_f32_c16", 42_173_248, 61_023_891, 135.45, 251.42),
        ("vq_f4", 22_337_423, 32_985_359, 345.24, 670.58),
        ("vq_f4_noattn", 21_285_775, 31_933_711, 302.29, 627.63),
        ("vq_f8", 27_397_784, 40_319_511, 226.11, 472.40),
        ("vq_f8_n256", 27_397_784, 40_254_999, 226.11, 472.40),
        ("vq_f16", 28_155_216, 41_438_155, 137.81, 252.13),
        ("vq_f32_c32", 42_173_248, 61_622_691, 135.45, 251.43),
        ("vqgan_f16", 29_363_968, 46_709_891, 138.43, 252.75),
        ("vqgan_f16_n1024", 29_363_968, 42_777_731, 138.43, 252.75),
    ],
)
def test_zoo(experiment: str, encoder: int, decoder: int, encode_gflop: float, decode_gflop: float) -> None:
    # At 256 px, counted from the original project's networks with its released configurations (vq_f32_c32, vqgan_f16
    # and the two KL variants: with their sizes put in); the codebook is among the decoder's parameters.
    size = measure_run(load_config([f"experiment={experiment}"]))
    assert (size.encoder.parameters, size.decoder.parameters) == (encoder, decoder)
    assert size.encoder.forward_flops / 1e9 == pytest.approx(encode_gflop, rel=FLOPS_TOLERANCE)
    assert size.decoder.forward_flops / 1e9 == pytest.approx(decode_gflop, rel=FLOPS_TOLERANCE)


def test_two_layer_discriminator_is_smaller() -> None:
    size = measure_run(load_config(["experiment=vq_f8"]))
    assert size.discriminator is not None
    # 4x4 convolutions 3-64, 64-128, 128-256, 256-1 and two norms.
    assert size.discriminator.parameters == 3136 + 131_072 + 524_288 + 4097 + 2 * (128 + 256)


def test_plan_of_the_identity_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=identity_f1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["latent_shape"] == [3, 256, 256]
    assert (plan["parameters"], plan["forward_flops"]) == (0, 0)
    assert "discriminator_parameters" not in plan
    assert main(["experiment=identity_f1"]) == 0
    assert "latents 3x256x256 (f=1)" in capsys.readouterr().out


def test_json_is_one_object_with_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=demo_text", "--json", "data.resolution=64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["forward_flops"] == plan["unet_forward_flops"]
    assert plan["parameters"] == plan["unet_parameters"] + plan["conditioner_parameters"]
    assert plan["resolution"] == 64
    assert plan["latent_shape"] == [4, 16, 16]
    assert "discriminator_parameters" not in plan


def test_table_and_json_tell_the_same() -> None:
    config = load_config(["experiment=demo_autoencoder"])
    size = measure_run(config)
    plan, table = plan_dict(config, size), plan_table(config, size)
    assert plan["parameters"] == plan["autoencoder_parameters"]
    assert "unet_parameters" not in plan
    assert f"{plan['parameters']:,}" in table
    assert f"{plan['discriminator_parameters']:,}" in table


def test_without_adversarial_loss_there_is_no_discriminator() -> None:
    config = load_config(["experiment=demo_autoencoder", "autoencoder_loss.adversarial_weight=0"])
    assert measure_run(config).discriminator is None
