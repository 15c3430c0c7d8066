"""Overrides -> typed configuration."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from ldm_scale.config import compose
from ldm_scale.config.compose import list_choices, list_experiments, list_groups, load_config
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.errors import ConfigError
from tests.helpers.commands import stage1, stage2
from tests.helpers.runs import AUTOENCODER, TEXT, UNET


def test_experiment_selects_groups_and_values() -> None:
    config = load_config(["experiment=sd1"])
    assert (config.experiment, config.run_dir, config.stage) == ("sd1", "runs/sd1", "diffusion")
    assert (config.unet.num_heads, config.unet.head_dim, config.unet.linear_projection) == (8, None, False)
    assert config.conditioning.text is not None
    assert config.conditioning.text.activation == "quick_gelu"
    assert config.train.global_batch == 2048


def test_values_win_over_the_experiment_and_the_later_over_the_earlier() -> None:
    config = load_config(["zero.stage=3", "experiment=demo_text", "zero.stage=2", "optimizer.lr=5e-4"])
    assert config.zero.stage == 2
    assert config.optimizer.lr == 5e-4
    assert load_config(["experiment=sd1", "experiment=sd2"]).experiment == "sd2"


def test_each_of_several_values_of_one_section_holds_in_their_order() -> None:
    given = ["unet={num_heads: 4, head_dim: null}", "unet.dropout=0.5", "unet={dropout: 0.25, base_channels: 64}"]
    unet = load_config(given).unet
    assert (unet.num_heads, unet.head_dim, unet.dropout, unet.base_channels) == (4, None, 0.25, 64)
    assert load_config([*given, "unet.dropout=0.5"]).unet.dropout == 0.5
    text = load_config(["conditioning.text={width: 16}", "conditioning.text=null", "conditioning.text={depth: 2}"])
    assert text.conditioning.text == TextConditioningConfig(depth=2)


def test_overrides_of_the_tests_give_the_tiny_networks(tmp_path: Path) -> None:
    config = load_config(stage2(tmp_path, tmp_path))
    assert config.unet == dataclasses.replace(UNET, linear_projection=config.unet.linear_projection)
    assert config.conditioning.text == dataclasses.replace(TEXT, activation="gelu")
    assert config.autoencoder == load_config(stage1(tmp_path, tmp_path)).autoencoder == AUTOENCODER


def test_groups_win_over_the_experiment() -> None:
    config = load_config(["experiment=sd2", "model=sd1"])
    assert config.unet.num_heads == 8
    assert config.conditioning.text is not None
    assert config.conditioning.text.width == 1024


def test_without_an_experiment_the_defaults_stand() -> None:
    config = load_config([])
    assert (config.experiment, config.run_dir) == ("", "")
    assert config.conditioning.text is not None
    assert config.conditioning.text.width == 1024


def test_run_dir_given_is_kept() -> None:
    assert load_config(["experiment=sd2", "run_dir=/tmp/x"]).run_dir == "/tmp/x"


@pytest.mark.parametrize(
    "text", ["/a (1)/b=c,d.json", "runs/[x]/{y}", "ends with space ", "12", "true", "a'b", 'it\'s, "so"']
)
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert load_config([f"artifact={text}"]).artifact == text


def test_quotes_around_text_are_taken_off_and_null_is_null() -> None:
    assert load_config(["artifact='a b'"]).artifact == "a b"
    assert load_config(["autoencoder_loss.perceptual_weights=null"]).autoencoder_loss.perceptual_weights is None
    assert load_config(["autoencoder_loss.perceptual_weights=/w.pth"]).autoencoder_loss.perceptual_weights == "/w.pth"


def test_lists_and_sections() -> None:
    assert load_config(["sampling.prompts=[red heart,'a, b']"]).sampling.prompts == ("red heart", "a, b")
    assert load_config(["unet.attention_levels=[]"]).unet.attention_levels == ()
    unet = load_config(["unet={head_dim: null, num_heads: 4}"]).unet
    assert (unet.head_dim, unet.num_heads, unet.base_channels) == (None, 4, 320)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=demo_txt", "did you mean experiment=demo_text?"),
        ("experiment=nothing", "choose bedrooms_ldm4, celeba_ldm1,"),
        ("model=sd3", "there is no configs/model/sd3.yaml"),
        ("unet=demo", "choose a file of configs/model with model=demo"),
        ("unet.base_chanels=3", "did you mean unet.base_channels?"),
        ("zero.stage=two", "zero.stage='two': must be a whole number"),
        ("data.resolution=64,128", "must be one value; write a list as data.resolution=[64,128]"),
        ("data.resolution='32", "data.resolution='32: cannot be read"),
        ("data.resolution=${oc.env:HOME}", "interpolations are refused"),
        ("data.manifest=${oc.env:HOME}", "interpolations are refused"),
        ("experiment=${oc.env:HOME}", "there is no configs/experiment/${oc.env:HOME}.yaml"),
        ("experiment=../../x", "there is no configs/experiment/../../x.yaml"),
        ("hydra.run.dir=x", "there is no such key"),
        ("unet._target_=os.system", "config values never name code to run"),
        ("+zero.stage=2", "no key can be added or deleted; write zero.stage=2"),
        ("~zero", "no key can be added or deleted"),
        ("zero.stage", "an override is key=value"),
        ("=3", "an override is key=value"),
    ],
)
def test_mistakes_are_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config([override])
    assert "\n" not in str(caught.value)


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    load_config(["experiment=demo_text"])
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == environment


def _config_dir(folder: Path, experiment: str) -> Path:
    (folder / "experiment").mkdir(parents=True)
    (folder / "train.yaml").write_text("defaults:\n  - _self_\n  - experiment: null\n")
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\n" + experiment)
    return folder


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("zero:\n  stag: 2\n", "zero.stag=2: there is no such key; did you mean zero.stage"),
        ("zero:\n  stage: ${oc.env:HOME}\n", "interpolations are refused"),
        ("artifact: ???\n", "artifact"),
        ("defaults:\n  - override /nothing: x\n", "configs/ cannot be composed for experiment=mine"),
        ("zero: [\n", "configs/ cannot be composed for experiment=mine"),
    ],
)
def test_mistakes_in_files_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, message: str
) -> None:
    monkeypatch.setattr(compose, "CONFIG_DIR", _config_dir(tmp_path / "configs", experiment))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(["experiment=mine"])
    assert "\n" not in str(caught.value)


def test_missing_folder_of_configs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "CONFIG_DIR", tmp_path / "configs")
    with pytest.raises(ConfigError, match="runs from a checkout"):
        load_config([])


def test_groups_and_choices_are_listed() -> None:
    assert "experiment" in list_groups()
    assert {"sd1", "sd2"} <= set(list_choices("model"))
    assert list_experiments() == sorted(list_experiments())
