"""Every experiment composes, validates and keeps its header's promises (its sizes: test_published_sizes)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm_scale.config.compose import CONFIG_DIR, list_choices, list_experiments, list_groups
from ldm_scale.config.convert import config_from_dict, config_to_dict
from ldm_scale.config.validate import validate, validate_architecture
from ldm_scale.errors import ConfigError
from tests.helpers.sizes import composed

# What only a user can give.
GIVEN = ("data.manifest=data/manifest.json", "artifact=runs/autoencoder/artifact")
# The batches that the paper prints for one GPU, which no two ranks can share.
ODD_BATCH = ("celeba_ldm1", "celeba_ldm2", "imagenet_ldm1", "imagenet_ldm2")
HEADER_FIELDS = ("Purpose:", "Command:", "Hardware:", "Hours:", "Expected:")


@pytest.mark.parametrize("name", list_experiments())
def test_experiment_composes_and_validates(name: str, tmp_path: Path) -> None:
    config = composed(f"experiment={name}", *GIVEN)
    if config.conditioning.text is not None and config.conditioning.text.tokenizer == "wordpiece":
        vocabulary = tmp_path / "vocab.txt"
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words += [f"word{number}" for number in range(len(words), config.conditioning.text.vocab_size)]
        vocabulary.write_text("\n".join(words))
        config = composed(f"experiment={name}", *GIVEN, f"conditioning.text.vocabulary={vocabulary}")
    for world_size in (1, 2):
        if config.stage == "autoencoder" and config.autoencoder.kind == "identity":
            with pytest.raises(ConfigError, match="nothing to train"):
                validate(config, world_size=world_size)
            validate_architecture(config)
        elif config.train.global_batch % world_size and name in ODD_BATCH:
            with pytest.raises(ConfigError, match="does not divide by the 2 ranks"):
                validate(config, world_size=world_size)
        else:
            validate(config, world_size=world_size)
    assert (config.experiment, config.run_dir) == (name, f"runs/{name}")
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize("name", list_experiments())
def test_experiment_tells_what_it_is_for(name: str) -> None:
    header = [
        line
        for line in (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text().splitlines()
        if line.startswith("# ") and not line.startswith("# @package")
    ]
    found = [field for line in header for field in HEADER_FIELDS if line.startswith(f"# {field}")]
    assert found == list(HEADER_FIELDS)
    assert re.search(rf"\bexperiment={name}\b|make demo", "\n".join(header))


@pytest.mark.parametrize("name", [name for name in list_experiments() if name.startswith(("kl_f", "vq_f", "vqgan_f"))])
def test_the_zoo_is_what_its_names_say(name: str) -> None:
    config = composed(f"experiment={name}")
    kind, f, *variants = name.split("_")
    autoencoder, loss = config.autoencoder, config.autoencoder_loss
    assert autoencoder.kind == kind.removesuffix("gan")
    assert autoencoder.downsampling_factor == int(f[1:])
    assert autoencoder.mid_attention == ("noattn" not in variants)
    for variant in variants:
        if variant[0] == "c":
            assert autoencoder.latent_channels == int(variant[1:])
        elif variant != "noattn":
            assert autoencoder.codebook_size == int(variant[1:])
    # The learning rate belongs to the batch, and the discriminator starts at the end of a step.
    assert config.optimizer.lr == pytest.approx(4.5e-6 * config.train.global_batch)
    assert loss.discriminator_start_images % config.train.global_batch == 0
    assert config.train.total_images % config.train.global_batch == 0


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group in list_groups() if group != "experiment" for name in list_choices(group)],
)
def test_every_file_of_a_group_fits_the_schema(group: str, name: str) -> None:
    composed(f"{group}={name}")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("demo_autoencoder", "demo_text"),
        ("openmoji_autoencoder", "openmoji_text"),
        ("gpu_demo_autoencoder", "gpu_demo_text"),
        ("openmoji_kl_f4_small", "openmoji_text_small"),
        ("openmoji_kl_f4_small", "openmoji_classes_small"),
        ("openmoji_kl_f4_small", "openmoji_unconditional_small"),
        ("openmoji_kl_f4_small", "openmoji_classifier_small"),
        ("openmoji_scenes_kl_f4_small", "openmoji_layout_small"),
        ("openmoji_scenes_kl_f4_small", "openmoji_semantic_small"),
        ("openmoji_scenes_kl_f4_small", "openmoji_inpaint_small"),
        ("openmoji_scenes_kl_f4_small", "openmoji_superres_small"),
    ],
)
def test_the_second_stage_fits_the_first(first: str, second: str) -> None:
    autoencoder, text = composed(f"experiment={first}"), composed(f"experiment={second}")
    assert text.autoencoder == autoencoder.autoencoder
    assert text.artifact == f"{autoencoder.run_dir}/artifact"
    assert text.data.resolution == autoencoder.data.resolution


@pytest.mark.parametrize(
    ("classifier", "model"),
    [
        ("imagenet_ldm8_classifier", "imagenet_ldm8"),
        ("openmoji_classifier_small", "openmoji_unconditional_small"),
    ],
)
def test_a_classifier_sees_the_latents_and_the_noise_of_its_model(classifier: str, model: str) -> None:
    guide, guided = composed(f"experiment={classifier}"), composed(f"experiment={model}")
    assert (guide.autoencoder, guide.artifact, guide.diffusion) == (
        guided.autoencoder,
        guided.artifact,
        guided.diffusion,
    )
    assert (guide.latents, guide.data.manifest) == (guided.latents, guided.data.manifest)
    assert guide.data.resolution == guided.data.resolution
