"""Rules across fields: each breach is named with its key, and correct neighbours pass."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

import pytest

from ldm_scale.config.compose import load_config
from ldm_scale.config.convert import config_to_dict, key_type
from ldm_scale.config.fit import batch_plan, check_artifact_fits
from ldm_scale.config.ranges import _RANGES
from ldm_scale.config.schema import BatchPlan, ConditioningConfig, Config
from ldm_scale.config.validate import validate, validate_architecture
from ldm_scale.errors import ConfigError

# Every number that the messages below repeat, so that tuning the experiment does not touch them.
TEXT = (
    "experiment=demo_text",
    "data.manifest=m.json",
    "artifact=a",
    "data.resolution=32",
    "train.global_batch=32",
    "autoencoder.base_channels=32",
    "autoencoder.channel_multipliers=[1,2,2]",
    "autoencoder.norm_groups=8",
    "unet.base_channels=64",
    "unet.channel_multipliers=[1,2,2]",
    "unet.attention_levels=[1,2]",
    "unet.head_dim=32",
    "conditioning.text.width=128",
    "conditioning.text.num_heads=4",
)
AUTOENCODER = ("experiment=demo_autoencoder", "data.manifest=m.json")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.global_batch=33"],
            "train.global_batch=33 does not divide by the 2 ranks of this run; set train.global_batch to a multiple of "
            "2 (32 or 34)",
        ),
        (["train.global_batch=1"], "set train.global_batch to a multiple of 2 (2)"),
        (["train.micro_batch=5"], "train.micro_batch=5 does not divide the 16 images of each rank"),
        (["train.micro_batch=32"], "set train.micro_batch=16, or null"),
        (["data.resolution=33"], "data.resolution=33 does not divide by the autoencoder's f=4"),
        (["data.resolution=40"], "set data.resolution to a multiple of 16 (32 or 48)"),
        (["unet.base_channels=65", "unet.norm_groups=1"], "set an even number, such as 66"),
        (["unet.norm_groups=24"], "unet.norm_groups=24 does not divide the 64 channels"),
        (["autoencoder.norm_groups=24"], "autoencoder.norm_groups=24 does not divide the 32 channels"),
        (["unet.head_dim=48"], "unet.head_dim=48 does not divide the 128 channels of level 1"),
        (["unet.head_dim=null", "unet.num_heads=3"], "unet.num_heads=3 does not divide the 128 channels of level 1"),
        (["unet.num_heads=4"], "unet.head_dim=32 and unet.num_heads=4: exactly one must be set"),
        (["unet.head_dim=null"], "unet.head_dim=null and unet.num_heads=null: exactly one must be set"),
        (["unet.attention_levels=[0,3]"], "level 3 does not exist"),
        (["unet.attention_levels=[-1]"], "level -1 does not exist"),
        (["unet.attention_levels=[2,1]"], "must rise, without repetition; write [1, 2]"),
        (["unet.channel_multipliers=[]"], "must have at least one level"),
        (["unet.channel_multipliers=[1,0,2]"], "unet.channel_multipliers=[1, 0, 2]: must be at least 1"),
        (["conditioning.text.num_heads=3"], "conditioning.text.width=128 does not divide by conditioning.text.num_he"),
        (["conditioning.text.max_tokens=2"], "conditioning.text.max_tokens=2: must be at least 3"),
        (["conditioning.text.vocab_size=49407"], "set conditioning.text.vocab_size=49408"),
        (["conditioning.text.drop_probability=1.5"], "must be at least 0 and at most 1"),
        (["conditioning.text.head_dim=32"], "heads of encoder=clip are width / num_heads wide"),
        (["conditioning.text.vocabulary=v.txt"], "tokenizer=clip brings its own vocabulary"),
        (
            ["conditioning.text.tokenizer=wordpiece", "conditioning.text.padding=zero"],
            "conditioning.text.padding=zero: tokenizer=wordpiece has a token of its own",
        ),
        (["conditioning.text.tokenizer=wordpiece"], "conditioning.text.vocabulary=null: conditioning.text.tokenizer=w"),
        (
            ["conditioning.text.tokenizer=wordpiece", "conditioning.text.padding=zero"],
            "tokenizer=wordpiece has a token of its own",
        ),
        (["conditioning.classes.width=64"], "conditioning.text.width=128, conditioning.classes.width=64: the tokens"),
        (["conditioning.layout.num_classes=8192"], "set conditioning.layout.num_tokens to at least 8193"),
        (["conditioning.layout.num_classes=3", "conditioning.layout.num_tokens=4"], "must be at least 5, for a grid"),
        (
            ["conditioning.layout.width=128", "conditioning.layout.head_dim=null", "conditioning.layout.num_heads=3"],
            "conditioning.layout.width=128 does not divide by conditioning.layout.num_heads=3",
        ),
        (["conditioning.semantic_map.num_labels=256"], "must be at least 1 and at most 255"),
        (["conditioning.inpainting.drop_probability=2"], "must be at least 0 and at most 1"),
        (["conditioning.low_resolution.factor=1"], "conditioning.low_resolution.factor=1: must be at least 2"),
        (["conditioning.low_resolution.factor=2"], "is below the autoencoder's f=4: the small image would be larger"),
        (["conditioning.low_resolution.factor=5"], "set data.resolution to a multiple of 5 (30 or 35)"),
        (["zero.stage=4"], "zero.stage=4: must be at least 0 and at most 3"),
        (["zero.discriminator_stage=2"], "zero.discriminator_stage=2: must be at least 0 and at most 1"),
        (["optimizer.betas=[0.9,1.0]"], "optimizer.betas=[0.9, 1.0]: must be at least 0 and below 1"),
        (["optimizer.lr=0"], "optimizer.lr=0.0: must be above 0"),
        (["optimizer.warmup_images=40000000"], "is not below train.total_images"),
        (["diffusion.beta_start=0.5"], "diffusion.beta_start=0.5, diffusion.beta_end=0.012: must satisfy"),
        (["diffusion.prediction=flow"], "sampling.sampler=ddim: visits timesteps, which diffusion.prediction=flow"),
        (["sampling.sampler=heun"], "sampling.sampler=heun: needs continuous time, and diffusion.prediction=eps"),
        (["sampling.guidance_interval=[5.0,1.0]"], "sampling.guidance_interval=[5.0, 1.0]: must be two rising"),
        (["sampling.num_steps=1001"], "sampling.num_steps=1001: must be between 1 and diffusion.num_timesteps=1000"),
        (["artifact="], "stage=diffusion works in the latent space of a trained autoencoder"),
        (["data.manifest="], "data.manifest='': training needs a data set"),
        (["train.activation_checkpointing=budget"], "budget needs train.memory_budget_gib"),
        (
            ["train.memory_budget_gib=8"],
            "train.memory_budget_gib=8 does nothing under train.activation_checkpointing=no",
        ),
        (
            ["train.activation_checkpointing=budget", "train.memory_budget_gib=0"],
            "memory_budget_gib=0.0: must be above 0",
        ),
        (["train.cuda_graphs=true"], "train.cuda_graphs=true needs zero.stage=0, got 1"),
        (["train.cuda_graphs=true", "zero.stage=0"], "train.cuda_graphs=true is for one rank, got 2"),
    ],
)
def test_breaches_are_one_line(overrides: list[str], message: str) -> None:
    config = load_config([*TEXT, *overrides])
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(config, world_size=2)
    assert "\n" not in str(caught.value)


def test_what_makes_the_unet_fast_is_not_for_stage_1() -> None:
    budget = ["train.activation_checkpointing=budget", "train.memory_budget_gib=8"]
    for overrides in (["train.compile=blocks"], ["train.cuda_graphs=true"], budget):
        with pytest.raises(ConfigError, match=r"stage=diffusion"):
            validate(load_config([*AUTOENCODER, *overrides]), world_size=1)
    fast = ["train.compile=blocks", *budget]
    validate(load_config([*TEXT, *fast]), world_size=2)
    validate(load_config([*TEXT, "train.compile=blocks", "train.cuda_graphs=true", "zero.stage=0"]), world_size=1)


def test_run_folder_is_needed() -> None:
    with pytest.raises(ConfigError, match="run_dir='': a run needs a folder"):
        validate(load_config(["data.manifest=m.json", "artifact=a"]), world_size=1)


def test_discriminator_must_fit_the_resolution() -> None:
    overrides = [*AUTOENCODER, "autoencoder_loss.discriminator_layers=4"]
    with pytest.raises(ConfigError, match=r"it needs 48 pixels"):
        validate(load_config(overrides), world_size=1)
    validate(load_config([*overrides, "autoencoder_loss.adversarial_weight=0"]), world_size=1)
    validate(load_config([*overrides, "data.resolution=48"]), world_size=1)


IDENTITY = (
    "autoencoder.kind=identity",
    "autoencoder.channel_multipliers=[1]",
    "autoencoder.latent_channels=3",
    "autoencoder_loss.adversarial_weight=0",
)
VQ = ("autoencoder.kind=vq", "autoencoder.codebook_size=64")
BATCH_NORM = ("autoencoder_loss.discriminator_norm=batch", "train.global_batch=32", "train.micro_batch=null")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["autoencoder.kind=vq"], "autoencoder.codebook_size=null: autoencoder.kind=vq needs the number of its codes"),
        (["autoencoder.codebook_size=8"], "only autoencoder.kind=vq has a codebook, and this is kind=kl"),
        ([*IDENTITY, "autoencoder.codebook_size=8"], "and this is kind=identity; set autoencoder.codebook_size=null"),
        ([*IDENTITY, "autoencoder.channel_multipliers=[1,2]"], "has f = 1, pixels being the latents"),
        (
            [*IDENTITY, "autoencoder.latent_channels=4"],
            "are the pixels, of 3 channels; set autoencoder.latent_channels=3",
        ),
        ([*IDENTITY], "has nothing to train; write its artifact with `ldm-scale export experiment=identity_f1"),
        (
            ["autoencoder.attention_levels=[3]"],
            "autoencoder.attention_levels=[3]: level 3 does not exist; the 3 levels",
        ),
        (["autoencoder.attention_levels=[2,2]"], "autoencoder.attention_levels=[2, 2]: must rise, without repetition"),
        ([*VQ, "latents.statistics=per_channel"], "not for autoencoder.kind=vq (the codes would have to be moved"),
        ([*IDENTITY, "latents.statistics=per_channel"], "not for autoencoder.kind=identity (no quant_conv"),
        (
            ["autoencoder_loss.codebook_update=ema"],
            "codebook_update=ema does nothing: autoencoder.kind=kl has no codebook",
        ),
        (["autoencoder_loss.dead_code_images=9"], "set autoencoder_loss.dead_code_images=0, or autoencoder.kind=vq"),
        (
            ["autoencoder_loss.discriminator_start_images=8", "autoencoder_loss.discriminator_pretrain_images=9"],
            "discriminator_pretrain_images=9 exceeds autoencoder_loss.discriminator_start_images=8",
        ),
        ([*BATCH_NORM], "those of 16 of the 32 images of a step (2 ranks, 1 forward pass each)"),
        (["ema.power_stds=[0.05,0.1,0.05]"], "ema.power_stds=[0.05, 0.1, 0.05]: a profile occurs twice"),
        (["ema.power_stds=[0.05,0.3]"], "ema.power_stds=[0.05, 0.3]: must be above 0 and at most 0.28"),
        (
            ["spikes.action=rollback", "train.checkpoint_every_images=0"],
            "spikes.action=rollback needs train.checkpoint_every_images above 0",
        ),
        (["ema.snapshot_every_images=64"], "ema.power_stds=[] has none; set ema.power_stds=[0.05, 0.1]"),
    ],
)
def test_breaches_of_stage_1_are_one_line(overrides: list[str], message: str) -> None:
    config = load_config([*AUTOENCODER, *overrides])
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(config, world_size=2)
    assert "\n" not in str(caught.value)


def test_one_weight_switches_the_discriminator_off_with_all_its_settings() -> None:
    settings = ["r1_weight=1.0", "adversarial_ramp_images=64", "discriminator_hold_accuracy=0.9"]
    overrides = [f"autoencoder_loss.{setting}" for setting in settings]
    validate(load_config([*AUTOENCODER, *overrides, "autoencoder_loss.adversarial_weight=0"]), world_size=1)


def test_batch_norm_needs_one_rank_and_one_forward_pass() -> None:
    config = load_config([*AUTOENCODER, *BATCH_NORM])
    validate(config, world_size=1)
    with pytest.raises(ConfigError, match=r"4 of the 32 images of a step \(1 rank, 8 forward passes each\)"):
        validate(load_config([*AUTOENCODER, *BATCH_NORM, "train.micro_batch=4"]), world_size=1)
    # Without a discriminator there is nothing to normalise.
    validate(load_config([*AUTOENCODER, *BATCH_NORM, "autoencoder_loss.adversarial_weight=0"]), world_size=2)


def test_what_the_kinds_allow() -> None:
    validate(load_config([*AUTOENCODER, "latents.statistics=per_channel"]), world_size=2)
    options = ("codebook_update=ema", "dead_code_images=64", "learned_variance=true")
    validate(load_config([*AUTOENCODER, *VQ, *(f"autoencoder_loss.{option}" for option in options)]), world_size=2)
    validate(load_config([*AUTOENCODER, "train.activation_checkpointing=full"]), world_size=1)
    validate(load_config([*TEXT, "train.activation_checkpointing=selective"]), world_size=1)


def test_identity_is_for_plans_exports_and_stage_2() -> None:
    validate_architecture(load_config([*AUTOENCODER, *IDENTITY]))
    validate(load_config([*TEXT, *IDENTITY]), world_size=1)


def test_transformers_need_a_context_and_self_attention_has_no_use_for_one() -> None:
    with pytest.raises(ConfigError, match=r"unet\.attention=transformer: cross-attention needs a context.*=self, or"):
        validate(load_config([*TEXT, "conditioning.text=null"]), world_size=1)
    with pytest.raises(ConfigError, match=r"unet\.attention=self: .*conditioning\.text; .*conditioning\.text=null"):
        validate(load_config([*TEXT, "unet.attention=self"]), world_size=1)
    without = [override for override in TEXT if not override.startswith("conditioning.text")]
    alone = [*without, "conditioning=none", "unet.attention=self"]
    validate(load_config(alone), world_size=1)
    validate(load_config([*alone, "conditioning.inpainting.masks=mixed"]), world_size=1)


def test_a_classifier_has_no_context_and_its_pooling_whole_heads() -> None:
    without = [override for override in TEXT if not override.startswith("conditioning.text")]
    classifier = [*without, "stage=classifier", "conditioning=none", "unet.attention=self", "classifier.num_classes=3"]
    validate(load_config(classifier), world_size=1)
    for override, message in (
        ("conditioning=classes", r"conditioning\.classes: a classifier of latents sees nothing beside them; set cond"),
        ("conditioning.inpainting.masks=mixed", r"conditioning\.inpainting: .* or conditioning\.inpainting=null"),
        ("unet.attention=transformer", r"unet\.attention=transformer: .* set unet\.attention=self"),
        ("classifier.pool_head_dim=48", r"does not divide the 128 channels .* set classifier\.pool_head_dim=32"),
        ("classifier.num_classes=0", r"classifier\.num_classes=0: must be at least 1"),
        ("diffusion.beta_end=1.5", r"diffusion\.beta"),
        ("artifact=", r"artifact='': stage=classifier works in the latent space"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(load_config([*classifier, override]), world_size=1)


def test_stage_1_does_not_care_about_the_unet() -> None:
    validate(load_config([*AUTOENCODER, "unet.norm_groups=7", "data.resolution=36"]), world_size=1)


def test_plan_needs_neither_data_nor_artifact_nor_ranks() -> None:
    validate_architecture(load_config(["experiment=sd2"]))


def test_bf16_on_the_cpu_is_allowed() -> None:
    validate(load_config([*TEXT, "train.device=cpu", "train.precision=bf16"]), world_size=1)


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], 1, BatchPlan(micro_batch=32, accumulation_steps=1, global_batch=32)),
        ([], 4, BatchPlan(micro_batch=8, accumulation_steps=1, global_batch=32)),
        (["train.micro_batch=4"], 2, BatchPlan(micro_batch=4, accumulation_steps=4, global_batch=32)),
        (["train.global_batch=30", "train.micro_batch=5"], 3, BatchPlan(5, 2, 30)),
    ],
)
def test_batch_plan(overrides: list[str], world_size: int, expected: BatchPlan) -> None:
    plan = batch_plan(load_config([*TEXT, *overrides]), world_size)
    assert plan == expected
    assert plan.micro_batch * plan.accumulation_steps * world_size == plan.global_batch


def test_artifact_must_be_of_the_configured_autoencoder() -> None:
    config = load_config(list(TEXT))
    check_artifact_fits(config, f=4, latent_channels=4)
    with pytest.raises(ConfigError, match=r"artifact=a has f=8, the config's autoencoder has f=4"):
        check_artifact_fits(config, f=8, latent_channels=4)
    with pytest.raises(ConfigError, match=r"latents of 3 channels, the config says autoencoder\.latent_channels=4"):
        check_artifact_fits(config, f=4, latent_channels=3)


def _number_keys(section: dict[str, object], prefix: str = "") -> set[str]:
    keys = set()
    for name, value in section.items():
        if isinstance(value, dict):
            keys |= _number_keys(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | list) and not isinstance(value, bool) and name != "prompts":
            keys.add(f"{prefix}{name}")
    return keys


def test_every_number_of_the_schema_has_bounds() -> None:
    bounded = {key for rule in _RANGES for key in rule.keys}
    kinds = {name: get_args(hint)[0]() for name, hint in get_type_hints(ConditioningConfig).items()}
    config = Config(conditioning=ConditioningConfig(**kinds))
    # Bounded elsewhere: by the number of levels, by the tokenizer, and by what is to be numbered.
    elsewhere = {
        "autoencoder.attention_levels",
        "unet.attention_levels",
        "conditioning.text.max_tokens",
        "conditioning.layout.num_tokens",
    }
    assert _number_keys(config_to_dict(config)) - bounded == elsewhere


def test_every_bound_names_a_field_once() -> None:
    keys = [key for rule in _RANGES for key in rule.keys]
    assert len(keys) == len(set(keys))
    assert [key for key in keys if key_type(key) is None] == []
