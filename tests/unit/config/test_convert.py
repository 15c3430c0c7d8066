"""The strict conversion, on the real schema."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from ldm_scale.config.convert import config_from_dict, config_to_dict, key_type, section_from_dict
from ldm_scale.config.schema import AutoencoderConfig, BatchPlan, Config, SamplingConfig, TrainConfig
from ldm_scale.errors import ConfigError


def test_round_trip_through_json_gives_the_same_config() -> None:
    config = dataclasses.replace(
        Config(),
        experiment="x",
        train=TrainConfig(micro_batch=4, precision="bf16"),
        sampling=SamplingConfig(prompts=("a red heart", "pizza")),
    )
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_plain_dictionary_has_only_json_types() -> None:
    plain = config_to_dict(Config())
    assert plain["unet"]["attention_levels"] == [0, 1, 2]
    assert plain["autoencoder_loss"]["perceptual_weights"] is None
    assert plain["optimizer"]["betas"] == [0.9, 0.999]


def test_missing_keys_take_their_defaults() -> None:
    assert config_from_dict({"zero": {"stage": 3}}).zero.stage == 3
    assert config_from_dict({}) == Config()


def test_a_section_converts_alone_and_names_its_place() -> None:
    assert section_from_dict(AutoencoderConfig, {"channel_multipliers": [1, 2]}).downsampling_factor == 2
    with pytest.raises(ConfigError, match=r"^autoencoder\.latent_channels='3': must be a whole number"):
        section_from_dict(AutoencoderConfig, {"latent_channels": "3"}, "autoencoder")


def test_a_dataclass_outside_the_tree_names_its_own_fields() -> None:
    with pytest.raises(ConfigError, match=r"^batch\.ranks=2: there is no such key; batch has micro_batch, accum"):
        section_from_dict(BatchPlan, {"ranks": 2}, "batch")


def test_whole_numbers_become_floats_and_lists_become_tuples() -> None:
    config = config_from_dict({"optimizer": {"lr": 1, "betas": [0, 0.5]}})
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.betas == (0.0, 0.5)
    assert all(isinstance(beta, float) for beta in config.optimizer.betas)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"unet": {"base_chanels": 3}}, "unet.base_chanels=3: there is no such key; did you mean unet.base_channels?"),
        ({"lr": 3}, "lr=3: there is no such key; did you mean optimizer.lr?"),
        ({"xyz": 3}, "xyz=3: there is no such key; the top level has experiment, stage"),
        ({"zero": {"stage": True}}, "zero.stage=True: must be a whole number, not bool"),
        ({"zero": {"stage": 2.0}}, "zero.stage=2.0: must be a whole number; write 2"),
        ({"zero": {"stage": "two"}}, "zero.stage='two': must be a whole number, not str"),
        ({"zero": 3}, "zero=3: zero is a section; set its keys one by one, such as zero.stage=..."),
        ({"zero": {"stage": None}}, "zero.stage=null: must be a whole number"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr=nan: must be finite"),
        ({"optimizer": {"lr": True}}, "optimizer.lr=True: must be a number, not bool"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas=[0.9]: must have 2 values, has 1"),
        ({"optimizer": {"betas": [0.9, "a"]}}, "optimizer.betas[1]='a': must be a number"),
        ({"unet": {"attention_levels": "012"}}, "unet.attention_levels='012': must be a list"),
        ({"data": {"horizontal_flip": 1}}, "data.horizontal_flip=1: must be true or false, not int"),
        ({"data": {"manifest": 3}}, "data.manifest=3: must be a text in quotes, not int"),
        ({"train": {"device": "gpu"}}, "train.device='gpu': must be one of auto, cpu, cuda"),
        ({"diffusion": {"schedule": "sqrt"}}, "diffusion.schedule='sqrt': must be one of linear, cosine"),
        ({"data": {"manifest": "${oc.env:HOME}"}}, "interpolations are refused"),
        ({"unet": {"_target_": "os.system"}}, "config values never name code to run"),
    ],
)
def test_mistakes_are_one_line_with_key_value_rule_and_fix(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        config_from_dict(data)
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(r"; \w|\?$", text), "no fix is given"


def test_key_type_follows_the_dots() -> None:
    assert key_type("zero.stage") is int
    assert key_type("unet.head_dim") == (int | None)
    assert key_type("zero.stage.x") is None
    assert key_type("nothing") is None
