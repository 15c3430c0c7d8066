"""The classic failures, provoked in real trainings of a tiny model, are named; a healthy training has no finding."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.engine import env
from ldm_scale.errors import NumericsError
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.telemetry.tensorboard import read_metrics
from ldm_scale.training import diagnosis, diffusion_product, streams
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import AUTOENCODER, CONDITIONING, TEXT, UNET, tiny_config
from tests.helpers.shards import png, write_tar

BATCH, RESOLUTION = 8, 16
CORNERS = ("upper left", "upper right", "lower left", "lower right")
UNET_OF_ONE_LEVEL = dataclasses.replace(UNET, channel_multipliers=(1,), attention_levels=(0,))


def _picture(corner: int, rng: np.random.Generator) -> np.ndarray:
    """A noisy picture that is bright in one corner."""
    pixels = rng.normal(60, 10, (RESOLUTION, RESOLUTION, 3))
    half = RESOLUTION // 2
    pixels[corner // 2 * half :, corner % 2 * half :][:half, :half] += 150
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose captions say which corner is bright, and an artifact whose statistics are those of its latents."""
    path, rng = tmp_path_factory.mktemp("diagnosis"), np.random.default_rng(0)
    (path / "data").mkdir()
    pictures = []
    for split in ("train", "heldout"):
        samples = []
        for number in range(32):
            pictures.append(_picture(number % 4, rng))
            members = {"png": png(Image.fromarray(pictures[-1])), "txt": CORNERS[number % 4].encode()}
            samples.append((f"{split}{number:05d}", members))
        index_tars([write_tar(path / "data" / f"{split}-000000.tar", samples)], path / "data" / "manifest.json", split)
    network = build_seeded(lambda: build_autoencoder(AUTOENCODER), seed=5)
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        z = network.encode_moments(x)[0]
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    for name, factor in (("artifact", 1.0), ("artifact100", 0.01)):
        write_artifact(
            path / name,
            {key: value.detach().clone() for key, value in network.state_dict().items()},
            AUTOENCODER,
            LatentStatistics(
                num_images=64,
                channel_mean=tuple(mean.tolist()),
                channel_std=tuple((factor * std).tolist()),
                posterior="mode",
            ),
            provenance={"images": 0, "resolution": RESOLUTION, "weights": "raw"},
        )
    return path


def _config(folder: Path, name: str, steps: int, **sections: Any) -> Config:
    given: dict[str, Any] = {
        "unet": UNET_OF_ONE_LEVEL,
        "data": {"validation_split": "heldout", "crop_scale_min": 1.0},
        "optimizer": {"lr": 1e-2},
        "train": {"total_images": steps * BATCH, "sample_every_images": 0},
        "sampling": {"num_steps": 1, "prompts": ("upper left",)},
        "latents": {"sample_posterior": False},
    }
    return tiny_config("diffusion", folder / "data" / "manifest.json", folder / name, **(given | sections))


def _train(configs: list[Config], same_batches: bool = False) -> list[str]:
    """Of each run the error that ended it, "" if none did. One process for all: starting takes longer than a run."""
    diagnosis.JUDGED_AFTER_STEPS = 20  # in this rank's own process
    diffusion_product.VALIDATION_IMAGES = diffusion_product.COMPARED_IMAGES = 32
    if same_batches:  # every rank reads what rank 0 reads
        build = streams.build_loader
        streams.build_loader = lambda *args, **options: build(*args, **(options | {"rank": 0}))
    errors = []
    for config in configs:
        environment = env.start(env.read_launch(), config.train)
        task = DiffusionTask(config, batch_plan(config, environment.world_size), environment)
        try:
            Trainer(config, task, environment).run()
        except NumericsError as error:
            errors.append(str(error))
        else:
            errors.append("")
    return errors


ALL_DROPPED = dataclasses.replace(CONDITIONING, text=dataclasses.replace(TEXT, drop_probability=1.0))
# Steps and sections of each run, by name.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    # Whether so small a network learns its captions in so few steps is luck: of the seeds 4 to 10 this one does.
    "healthy": (
        100,
        {"optimizer": {"lr": 2e-2}, "train": {"total_images": 100 * BATCH, "sample_every_images": 0, "seed": 7}},
    ),
    "scale": (24, {"artifact": "artifact100", "optimizer": {"lr": 1e-4}}),
    "rate": (24, {"optimizer": {"lr": 1e-9}}),
    "dropped": (24, {"conditioning": ALL_DROPPED}),
    "average": (24, {"ema": {"half_life_images": 1e7, "warmup_ratio": 0.0}}),
    "diverged": (40, {"optimizer": {"lr": 1e18, "gradient_clip": None}}),
}


@pytest.fixture(scope="module")
def errors(folder: Path) -> dict[str, str]:
    """The runs' errors, by name, after all of them have been trained."""
    configs = []
    for name, (steps, sections) in RUNS.items():
        artifact = str(folder / sections.get("artifact", "artifact"))
        configs.append(_config(folder, name, steps, **(sections | {"artifact": artifact})))
    return dict(zip(RUNS, run_ranks(_train, 1, configs, timeout_s=280.0)[0], strict=True))


def _findings(folder: Path, name: str) -> dict[str, str]:
    """What is written of a run's findings, by their names."""
    result = json.loads((folder / name / "result.json").read_text())
    return {finding["name"]: finding["seen"] + "; " + finding["advice"] for finding in result["findings"]}


@pytest.mark.timeout(300)
def test_a_healthy_run_has_none_and_its_figures_add_up(folder: Path, errors: dict[str, str]) -> None:
    assert errors["healthy"] == ""
    assert _findings(folder, "healthy") == {}
    figures = read_metrics(folder / "healthy")[-1]
    assert figures["validation/latents/std"] == pytest.approx(1.0, abs=0.05)
    assert figures["validation/raw/mean"] < 0.8 * figures["validation/zero/mean"]
    assert figures["validation/true/mean"] == pytest.approx(figures["validation/raw/mean"], rel=1e-6)  # the same images
    gap = figures["validation/gap/text"]
    assert figures["validation/shuffled/mean"] - figures["validation/true/mean"] == pytest.approx(gap, abs=1e-6)
    assert gap > 3 * figures["validation/gap_error/text"], "the caption provably matters"
    assert figures["validation/null/mean"] > figures["validation/true/mean"]
    for name in ("raw", "ema", "zero", "linear"):
        bins = [figures[f"validation/{name}/bin{i}"] for i in range(8)]
        assert figures[f"validation/{name}/mean"] == pytest.approx(sum(bins) / 8)
    assert figures["validation/linear/mean"] < figures["validation/zero/mean"]
    _require_shown_in_tensorboard(folder / "healthy")


def _require_shown_in_tensorboard(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert events.Images("validation/noise_levels")
    assert events.Tensors("diagnosis/text_summary")[-1].tensor_proto.string_val == [b"nothing found"]
    assert events.Tensors("custom_scalars__config__")
    assert events.Scalars("validation/ema/bin7")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "finding", "words"),
    [
        ("scale", "latent scale", r"have deviation (99|100)\S* where the process expects 1"),
        ("scale", "loss stuck", "the latents' scale: their deviation is"),
        ("rate", "loss stuck", "raise optimizer.lr=1e-09"),
        ("dropped", "conditioning ignored: text", "lower conditioning.text.drop_probability=1, 0.1 is usual"),
        ("average", "EMA lags", r"its half-life is 1e\+07 images"),
    ],
)
def test_what_fails_is_named(folder: Path, errors: dict[str, str], name: str, finding: str, words: str) -> None:
    assert errors[name] == ""
    found = _findings(folder, name)
    assert re.search(words, found[finding])
    # Whoever learns nothing, or for 24 steps alone, does not use captions yet. Nothing else may come along.
    expected = {finding, "conditioning ignored: text"} | ({"latent scale", "loss stuck"} if name == "scale" else set())
    assert found.keys() <= expected


def test_a_loss_that_is_not_finite_ends_the_run(errors: dict[str, str]) -> None:
    assert "10 steps in a row could not be made (train.max_skipped_steps=10)" in errors["diverged"]


@pytest.mark.timeout(300)
def test_ranks_that_are_fed_the_same_batch_stop_before_the_first_step(folder: Path) -> None:
    ranks = run_ranks(_train, 2, [_config(folder, "same", 10, artifact=str(folder / "artifact"))], True)
    assert ranks[0] == ranks[1]
    assert "at 0 images: ranks 0 and 1 both train on image 0 of the run" in ranks[0][0]
