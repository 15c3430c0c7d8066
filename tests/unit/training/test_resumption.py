"""What a run keeps to its end, and what may change when it is continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm_scale.config.compose import load_config
from ldm_scale.config.convert import config_to_dict
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.training.resumption import require_same_artifact, require_same_run

CHECKPOINT = Path("runs/a/checkpoints/images-0000000016")


def given(*overrides: str) -> dict[str, Any]:
    return config_to_dict(load_config(["experiment=openmoji_text_small", *overrides]))


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=1",
        "train.global_batch=32",
        "data.resolution=128",
        "diffusion.prediction=x0",
        "diffusion.schedule=cosine",
        "diffusion.beta_end=0.5",
        "conditioning.text.max_tokens=64",
        "unet.head_dim=8",
        "conditioning.text.activation=quick_gelu",
    ],
)
def test_another_meaning_is_refused_with_both_values(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(
        ConfigError, match=rf"the run in runs/a was started with other settings \({key}: .* saved, {value} given\)"
    ):
        require_same_run(CHECKPOINT, given(), given(override))


def test_another_kind_of_conditioning_is_refused() -> None:
    other = given()
    other["conditioning"] |= {"text": None, "classes": {"num_classes": 10, "width": 8, "drop_probability": 0.1}}
    with pytest.raises(ConfigError, match=r"conditioning\.classes\.num_classes: None saved, 10 given"):
        require_same_run(CHECKPOINT, given(), other)


def test_what_changes_no_meaning_may_change() -> None:
    changed = given(
        "train.total_images=99999",
        "optimizer.lr=1e-5",
        "conditioning.text.drop_probability=0.5",
        "diffusion.weighting=min_snr",
        "zero.stage=2",
        "unet.dropout=0.25",
    )
    require_same_run(CHECKPOINT, given(), changed)
    older = given()
    del older["unet"]["dropout"], older["unet"]["head_dim"]  # keys that came later
    require_same_run(CHECKPOINT, older, given())


def test_another_autoencoder_is_refused() -> None:
    require_same_artifact(CHECKPOINT, "a" * 64, "a" * 64, "runs/ae/artifact")
    with pytest.raises(
        CheckpointError, match="on the autoencoder aaaaaaaaaaaa, artifact=runs/ae/artifact is bbbbbbbbbbbb"
    ):
        require_same_artifact(CHECKPOINT, "a" * 64, "b" * 64, "runs/ae/artifact")
