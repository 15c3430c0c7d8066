"""Every experiment builds on the meta device, and our networks have the published sizes, counted there.

Stable Diffusion 1.x and 2.x at 512 px with 77 tokens, the models of arXiv:2112.10752, Tables 12 to 15 and its first
stages, Table 8. The GFLOP were counted independently from the original projects' code and configurations; the
parameters are those of the released models (in millions: Stable Diffusion's UNets 859.52 and 865.91, KL-f8 83.65, KL-f4
55.31, the three-layer PatchGAN 2.77).
"""

from __future__ import annotations

import json

import pytest

from ldm_scale.config.compose import list_experiments, load_config
from ldm_scale.plan import main, plan_dict, plan_table
from ldm_scale.planning.flops import measure_run
from tests.helpers.cases import rarely
from tests.helpers.sizes import composed, measured

FLOPS_TOLERANCE = 0.005


@pytest.mark.parametrize(
    ("experiment", "unet_parameters", "text_parameters", "unet_gflop", "text_gflop"),
    [("sd1", 859_520_964, 123_060_480, 803.3, 13.3), ("sd2", 865_910_724, 340_387_840, 804.3, 45.1)],
)
def test_stable_diffusion(
    experiment: str, unet_parameters: int, text_parameters: int, unet_gflop: float, text_gflop: float
) -> None:
    size = measured(f"experiment={experiment}")
    assert size.unet is not None
    assert size.latent_shape == (4, 64, 64)
    assert size.unet.parameters == unet_parameters
    assert size.conditioner["text"].parameters == text_parameters
    assert size.unet.forward_flops / 1e9 == pytest.approx(unet_gflop, rel=FLOPS_TOLERANCE)
    assert size.conditioner["text"].forward_flops / 1e9 == pytest.approx(text_gflop, rel=FLOPS_TOLERANCE)
    assert size.trained.parameters == size.unet.parameters + size.conditioner["text"].parameters
    assert size.trained.forward_flops == size.unet.forward_flops


@pytest.mark.parametrize(("experiment", "frozen"), [("sd1", "frozen_clip_l"), ("sd2", "frozen_openclip_h")])
def test_a_frozen_text_encoder_is_not_trained(experiment: str, frozen: str) -> None:
    joint, size = (measured(f"experiment={experiment}", *choice) for choice in ([], [f"conditioning={frozen}"]))
    assert joint.unet == size.unet
    assert list(size.conditioner) == ["frozen_text"]
    assert size.unet is not None
    assert size.trained.parameters == size.unet.parameters


# Parameters of the UNet, its GFLOP and the latents' shape. The original code on the meta device gives all of them. What
# the paper prints agrees but for superres_ldm4 (Table 15: 169M), layout_coco_ldm8 (345M with its encoder, here 366.9M)
# and LDM-4 of ImageNet (391M, 395M and 400M in three tables).
UNETS = {
    "celebahq_ldm4": (274_056_163, 202.40, (3, 64, 64)),
    "ffhq_ldm4": (274_056_163, 202.40, (3, 64, 64)),
    "bedrooms_ldm4": (274_056_163, 202.40, (3, 64, 64)),
    "churches_ldm8": (294_966_916, 41.85, (4, 32, 32)),
    "celeba_ldm1": (270_458_115, 1132.8, (3, 256, 256)),
    "celeba_ldm2": (264_510_722, 482.98, (2, 128, 128)),
    "celeba_ldm4": (274_056_163, 202.40, (3, 64, 64)),
    "celeba_ldm8": (257_733_124, 79.69, (4, 32, 32)),
    "celeba_ldm16": (257_751_560, 18.80, (8, 16, 16)),
    "celeba_ldm32": (257_862_176, 4.661, (32, 8, 8)),
    "imagenet_ldm1": (396_835_971, 1188.4, (3, 256, 256)),
    "imagenet_ldm2": (390_888_578, 538.57, (2, 128, 128)),
    "imagenet_ldm4": (400_920_579, 208.45, (3, 64, 64)),
    "imagenet_ldm4_b1200": (400_920_579, 208.45, (3, 64, 64)),
    "imagenet_ldm8": (394_984_196, 114.07, (4, 32, 32)),
    "imagenet_ldm16": (395_002_632, 27.41, (8, 16, 16)),
    "imagenet_ldm32": (395_113_248, 6.829, (32, 8, 8)),
    "text_ldm8": (872_300_484, 182.07, (4, 32, 32)),
    "layout_openimages_ldm4": (246_277_379, 151.24, (3, 64, 64)),
    "layout_coco_ldm8": (312_241_540, 95.78, (4, 32, 32)),
    "superres_ldm4": (113_622_563, 80.46, (3, 64, 64)),
    "inpaint_ldm4": (215_230_467, 207.64, (3, 64, 64)),
    "inpaint_ldm4_big": (387_245_827, 300.86, (3, 64, 64)),
    "semantic_ldm4": (215_229_315, 207.63, (3, 64, 64)),
}


@pytest.mark.parametrize("experiment", UNETS)
def test_unets_of_the_paper(experiment: str) -> None:
    parameters, gflop, latent_shape = UNETS[experiment]
    size = measured(f"experiment={experiment}")
    assert size.unet is not None
    assert size.latent_shape == latent_shape
    assert size.unet.parameters == parameters
    assert size.unet.forward_flops / 1e9 == pytest.approx(gflop, rel=FLOPS_TOLERANCE)


@pytest.mark.parametrize(
    ("experiment", "section", "parameters", "unused_output_layer", "published"),
    [
        ("text_ldm8", "text", 542_895_360, (1280 + 1) * 30_522, 1.45e9),
        ("layout_openimages_ldm4", "layout", 54_656_000, (512 + 1) * 8192, 306e6),
    ],
)
def test_text_and_layout_encoders_of_the_paper(
    experiment: str, section: str, parameters: int, unused_output_layer: int, published: float
) -> None:
    # The original encoder has an output layer over the vocabulary that nothing reads; we have none, and with it the
    # totals that Table 15 prints come out.
    size = measured(f"experiment={experiment}")
    assert size.conditioner[section].parameters == parameters
    assert size.trained.parameters + unused_output_layer == pytest.approx(published, rel=0.004)


# Iterations, batch and learning rate of every column, and the schedule and loss of the released code.
PAPER = {"beta_start": 0.0015, "beta_end": 0.0195, "loss": "l2"}
L1 = PAPER | {"beta_end": 0.0205, "loss": "l1"}
RECIPES: dict[str, tuple[int, int, float, dict[str, object]]] = {
    "celebahq_ldm4": (410_000, 48, 9.6e-5, PAPER),
    "ffhq_ldm4": (635_000, 42, 8.4e-5, PAPER),
    "churches_ldm8": (500_000, 96, 5e-5, PAPER | {"beta_end": 0.0155, "loss": "l1"}),
    "bedrooms_ldm4": (1_900_000, 48, 9.6e-5, PAPER),
    "celeba_ldm1": (500_000, 9, 9e-5, PAPER),
    "celeba_ldm2": (500_000, 11, 1.1e-4, PAPER),
    "celeba_ldm4": (500_000, 48, 9.6e-5, PAPER),
    "celeba_ldm8": (500_000, 96, 9.6e-5, PAPER),
    "celeba_ldm16": (500_000, 128, 1.3e-4, PAPER),
    "celeba_ldm32": (500_000, 128, 1.3e-4, PAPER),
    "imagenet_ldm1": (2_000_000, 7, 4.9e-5, PAPER),
    "imagenet_ldm2": (2_000_000, 9, 6.3e-5, PAPER),
    "imagenet_ldm4": (2_000_000, 40, 8e-5, PAPER),
    "imagenet_ldm8": (2_000_000, 64, 6.4e-5, PAPER),
    "imagenet_ldm16": (2_000_000, 112, 4.5e-5, PAPER),
    "imagenet_ldm32": (2_000_000, 112, 4.5e-5, PAPER),
    "imagenet_ldm4_b1200": (178_000, 1200, 1e-4, PAPER),
    "text_ldm8": (390_000, 680, 1e-4, {"beta_start": 0.00085, "beta_end": 0.012, "loss": "l2"}),
    "layout_openimages_ldm4": (4_400_000, 24, 4.8e-5, L1),
    "layout_coco_ldm8": (170_000, 48, 4.8e-5, L1),
    "superres_ldm4": (860_000, 64, 6.4e-5, PAPER | {"beta_end": 0.0155}),
    "inpaint_ldm4": (360_000, 128, 1.28e-4, L1),
    "inpaint_ldm4_big": (360_000, 128, 1.28e-5, L1),
    "semantic_ldm4": (360_000, 48, 4.8e-5, L1),
}


@pytest.mark.parametrize("experiment", RECIPES)
def test_recipes_of_the_paper(experiment: str) -> None:
    iterations, batch, lr, diffusion = RECIPES[experiment]
    config = composed(f"experiment={experiment}")
    assert config.train.total_images == iterations * batch
    assert config.train.global_batch == batch
    assert config.optimizer.lr == pytest.approx(lr)
    assert {name: getattr(config.diffusion, name) for name in diffusion} == diffusion
    assert (config.diffusion.prediction, config.diffusion.schedule, config.diffusion.num_timesteps) == (
        "eps",
        "linear",
        1000,
    )
    # A decay of 0.9999 per step, as in the released code.
    assert 0.5 ** (batch / config.ema.half_life_images) == pytest.approx(0.9999, abs=1e-6)


def test_recipes_and_sizes_are_of_the_same_experiments() -> None:
    assert UNETS.keys() == RECIPES.keys()


@pytest.mark.parametrize(
    ("experiment", "resolution", "unet_gflop"),
    [("sd1", 256, 180.1), ("sd1", 768, 2148.0), ("sd2", 256, 181.1), ("sd2", 768, 2149.0)],
)
def test_stable_diffusion_at_other_resolutions(experiment: str, resolution: int, unet_gflop: float) -> None:
    # Attention grows with the square of the area: a count without it fits one resolution at most.
    size = measured(f"experiment={experiment}", f"data.resolution={resolution}")
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
    size = measured(f"experiment={experiment}", f"data.resolution={resolution}")
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
    size = measured(f"experiment={experiment}")
    assert (size.encoder.parameters, size.decoder.parameters) == (encoder, decoder)
    assert size.encoder.forward_flops / 1e9 == pytest.approx(encode_gflop, rel=FLOPS_TOLERANCE)
    assert size.decoder.forward_flops / 1e9 == pytest.approx(decode_gflop, rel=FLOPS_TOLERANCE)


def test_two_layer_discriminator_is_smaller() -> None:
    size = measured("experiment=vq_f8")
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
    assert plan["conditioner_parts"]["text"]["parameters"] == plan["conditioner_parameters"]
    assert plan["resolution"] == 64
    assert plan["latent_shape"] == [4, 16, 16]
    assert "discriminator_parameters" not in plan


def test_the_memory_of_a_rank_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["experiment=demo_text", "train.global_batch=16", "zero.stage=3", "zero.offload_optimizer=true"]
    assert main([*overrides, "--ranks", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    memory = plan["memory"]
    assert (memory["ranks"], memory["zero_stage"], memory["bytes_per_number"]) == (4, 3, 2)
    assert memory["host"]["held"]["moments"] == 8 * -(-plan["parameters"] // 4)
    assert memory["device"]["held"]["weights"] == 2 * -(-plan["parameters"] // 4)
    assert memory["device"]["peak"] > memory["device"]["between_steps"] > 0
    assert main([*overrides, "--ranks", "4"]) == 0
    text = capsys.readouterr().out
    assert "memory of a rank (1 of 4, ZeRO stage 3, bf16, 4 images at once)" in text
    assert "\nhost" in text


def test_table_and_json_tell_the_same() -> None:
    config = load_config(["experiment=demo_autoencoder"])
    size = measure_run(config)
    plan, table = plan_dict(config, size), plan_table(config, size)
    assert plan["parameters"] == plan["autoencoder_parameters"]
    assert "unet_parameters" not in plan
    assert f"{plan['parameters']:,}" in table
    assert f"{plan['discriminator_parameters']:,}" in table


def test_the_table_names_the_parts_of_tau_theta(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["conditioning=classes", "conditioning.frozen_text.width=512", "conditioning.inpainting.masks=mixed"]
    assert main(["experiment=demo_text", *overrides]) == 0
    lines = capsys.readouterr().out.partition("\nmemory")[0].splitlines()
    assert [line[:20].strip() for line in lines[-6:-1]] == [
        "autoencoder decode",
        "frozen text encoder",
        "class embedding",
        "image and mask",
        "UNet",
    ]
    assert "(UNet + class embedding)" in lines[-1]


def test_a_frozen_tower_is_shown_and_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """OpenCLIP ViT-H's has 354.0M weights (open_clip's table of models); two FLOPs for each of 302M and 77 tokens."""
    overrides = ["experiment=demo_text", "conditioning=frozen_openclip_h"]
    assert main([*overrides, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["frozen_text_encoder_parameters"] == pytest.approx(354.0e6, rel=0.01)
    assert plan["frozen_text_encoder_forward_flops"] == pytest.approx(2 * 24 * 12 * 1024**2 * 77, rel=0.03)
    assert plan["parameters"] == plan["unet_parameters"]
    assert main(overrides) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frozen text encoder")]
    assert f"{plan['frozen_text_encoder_parameters']:,}" in line


def test_the_classifier_of_ldm8_g_has_the_papers_size() -> None:
    """With LDM-8 506M in arXiv:2112.10752, Table 18; here 506.5M."""
    classifier, model = measured("experiment=imagenet_ldm8_classifier"), measured("experiment=imagenet_ldm8")
    assert model.unet is not None
    assert classifier.latent_shape == model.latent_shape
    assert classifier.trained.parameters / 1e6 == pytest.approx(111.5, abs=0.05)
    assert (classifier.trained.parameters + model.unet.parameters) / 1e6 == pytest.approx(506, rel=0.002)


def test_a_classifier_is_planned_by_itself() -> None:
    config = load_config(["experiment=demo_text", "stage=classifier", "unet.attention=self", "conditioning=none"])
    size = measure_run(config)
    plan = plan_dict(config, size)
    assert plan["parameters"] == plan["classifier_parameters"]
    assert "unet_parameters" not in plan
    assert "(classifier)" in plan_table(config, size)


def test_without_adversarial_loss_there_is_no_discriminator() -> None:
    config = load_config(["experiment=demo_autoencoder", "autoencoder_loss.adversarial_weight=0"])
    assert measure_run(config).discriminator is None


COUNTED = (
    *UNETS,
    "sd1",
    "sd2",
    "demo_text",
    "demo_autoencoder",
    "imagenet_ldm8_classifier",
    "identity_f1",
    "kl_f4",
    "vq_f8",
)


@pytest.mark.parametrize("name", [name if name in COUNTED else rarely(name) for name in list_experiments()])
def test_experiment_builds_on_meta(name: str) -> None:
    config = composed(f"experiment={name}")
    size = measured(f"experiment={name}")
    assert size.latent_shape[0] == config.autoencoder.latent_channels
    assert size.latent_shape[1] * config.autoencoder.downsampling_factor == config.data.resolution
    assert (size.unet is not None) == (config.stage == "diffusion")
    assert (size.classifier is not None) == (config.stage == "classifier")
    trains = config.autoencoder.kind != "identity" or config.stage != "autoencoder"
    assert (size.trained.parameters > 0) == trains
    assert (size.trained.forward_flops > 0) == trains
