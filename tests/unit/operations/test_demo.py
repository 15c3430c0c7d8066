from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ldm_scale.config.schema import Config, OptimizerConfig, TrainConfig
from ldm_scale.errors import LdmScaleError
from ldm_scale.operations import demo
from ldm_scale.operations.demo import Recipe, choose_recipe
from ldm_scale.operations.demo_report import _images, _markdown, _summary
from tests.helpers.cases import rarely

CONFIGS = [
    Config(
        experiment=name,
        train=TrainConfig(total_images=total, global_batch=batch),
        optimizer=OptimizerConfig(warmup_images=80),
    )
    for name, total, batch in (("a", 8000, 8), ("b", 16000, 16))
]


def _recipe(folder: Path) -> Recipe:
    return Recipe("a", "b", "demo", 64, folder / "data", folder / "runs")


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (1000.0, [8000, 16000]),  # 24 s for all, 60 allowed
        (200.0, [4000, 8000]),  # 120 s for all: half of each
        (0.1, [88, 96]),  # hopeless: one step beyond the warm-up
    ],
)
def test_both_trainings_get_the_same_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, expected: list[int]
) -> None:
    monkeypatch.setattr(demo, "images_per_s", lambda *_: (rate, rate))
    assert demo._plan_totals(_recipe(tmp_path), *CONFIGS, minutes=1.0) == expected


def test_a_shortened_training_starts_its_discriminator_at_the_same_share() -> None:
    loss = dataclasses.replace(CONFIGS[0].autoencoder_loss, discriminator_start_images=6000)
    config = dataclasses.replace(CONFIGS[0], autoencoder_loss=loss)
    assert demo._scaled(config, 8000) == ["autoencoder_loss.discriminator_start_images=6000"]
    assert demo._scaled(config, 804) == ["autoencoder_loss.discriminator_start_images=600"]
    assert demo._scaled(dataclasses.replace(config, stage="diffusion"), 804) == []


def test_a_second_call_keeps_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "images_per_s", lambda *_: (200.0, 200.0))
    first = demo._plan_totals(_recipe(tmp_path), *CONFIGS, minutes=1.0)
    monkeypatch.setattr(demo, "images_per_s", lambda *_: (1000.0, 1000.0))
    assert demo._plan_totals(_recipe(tmp_path), *CONFIGS, minutes=1.0) == first


def test_a_finished_training_is_reused_and_a_failed_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"images": 64}))
    assert demo._train(tmp_path, ["experiment=none_such"], total_images=64)
    with pytest.raises(LdmScaleError, match="ended with status 2"):
        demo._train(tmp_path, ["experiment=none_such"], total_images=128)


@pytest.mark.parametrize(
    "content",
    [
        rarely(b""),
        b'{"images": 6',
        rarely(b"[]"),
        rarely(b"{}"),
        rarely(b"\xff\x00"),
        b'{"images": null, "total_images": 7}',
    ],
)
def test_a_damaged_record_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    recipe = _recipe(tmp_path)
    recipe.out.mkdir(parents=True)
    for path in (recipe.out / "plan.json", tmp_path / "result.json"):
        path.write_bytes(content)
    monkeypatch.setattr(demo, "images_per_s", lambda *_: (1000.0, 1000.0))
    assert demo._plan_totals(recipe, *CONFIGS, minutes=1.0) == [8000, 16000]
    assert json.loads((recipe.out / "plan.json").read_text())["total_images"] == [8000, 16000]
    with pytest.raises(LdmScaleError, match="ended with status 2"):  # it is trained once more, here with a typo
        demo._train(tmp_path, ["experiment=none_such"], total_images=64)
    with pytest.raises(LdmScaleError, match=r"result\.json is missing or damaged; run the demo again"):
        _images(tmp_path)


def test_stage_2_reads_the_artifact_that_stage_1_leaves(tmp_path: Path) -> None:
    recipe = dataclasses.replace(choose_recipe(tmp_path, tmp_path), data=tmp_path / "d", runs=tmp_path / "r")
    first, second = recipe.overrides()
    run_dir = next(o for o in first if o.startswith("run_dir=")).removeprefix("run_dir=")
    assert f"artifact={run_dir}/artifact" in second


def test_the_report_says_what_was_measured() -> None:
    report = {
        "images": {"autoencoder": 11, "diffusion": 22},
        "reconstruction": {"psnr_db": 21.5, "bicubic_psnr_db": 15.75},
        "losses": {"raw": [0.2] * 8, "ema": [0.1] * 8, "zero": [1.0] * 8},
        "frechet": {
            "name": "FD-X",
            "closed": 0.75,
            "protocol": {"features": "X"},
            "distances": {"untrained": 100.0, "trained": 25.0, "real_against_real": 0.5},
        },
    }
    report["summary"] = _summary(report)
    text = _markdown(report)
    for part in ("21.50 dB (bicubic 15.75 dB)", "0.100 (predicting zero 1.000)", "75% of the way", "| 8 of 8 |"):
        assert part in text
