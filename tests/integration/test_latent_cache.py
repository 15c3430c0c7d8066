"""Training on a latent cache is training on its images, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ldm_scale.__main__ import main
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.data import Loader, build_loader
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.engine import env
from ldm_scale.engine.collectives import mean_over_ranks
from ldm_scale.training import diffusion_product
from ldm_scale.training.diffusion_step import DiffusionTask
from tests.helpers.cases import rarely
from tests.helpers.commands import stage2
from tests.helpers.latents import encode, other_artifact
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import set_random_outputs, tiny_artifact, tiny_config
from tests.helpers.shards import broken_png, make_dataset, make_sample, write_tar

STEPS = 6
CROPS = ["--crops", "4", "--crop-scale-min", "0.6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples in three shards, two of which cannot be used, and caches of them."""
    path = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    samples = [(f"{n:03d}", make_sample(n, 20, rng)) for n in range(24)]
    samples[5][1]["png"] = broken_png()
    samples[17][1]["txt"] = b"\x81"
    (path / "data").mkdir()
    tars = [write_tar(path / "data" / f"s{n}.tar", samples[8 * n : 8 * n + 8]) for n in range(3)]
    index_tars(tars, path / "data" / "manifest.json", "train")
    tiny_artifact(path / "artifact")
    encode(path, "--dtype", "float32", out="whole")
    encode(path, "--dtype", "float32", "--max-shards", "1", out="mixed")
    encode(path, out="half")
    encode(path, "--flips", "--dtype", "float32", out="flips")
    encode(path, *CROPS, "--flips", "--dtype", "float32", out="crops")
    return path


def _config(folder: Path, manifest: str, flip: bool = False, crop: float = 1.0, **sections: Any) -> Config:
    data = {"horizontal_flip": flip, "crop_scale_min": crop}
    config = tiny_config("diffusion", folder / manifest / "manifest.json", folder / "run", data=data, **sections)
    return dataclasses.replace(config, artifact=str(folder / "artifact"))


def _start(config: Config) -> DiffusionTask:
    launch = env.read_launch()
    environment = env.start(launch, config.train)
    task = DiffusionTask(config, batch_plan(config, launch.world_size), environment)
    set_random_outputs(task.network, seed=3)
    return task


def _loader(task: DiffusionTask) -> Loader:
    return build_loader(
        task.config.data,
        seed=task.config.train.seed,
        global_batch=task.plan.global_batch,
        micro_batch=task.plan.micro_batch,
        rank=task.environment.rank,
        world_size=task.environment.world_size,
        accept_latents=True,
    )


def _run(config: Config) -> dict[str, Any]:
    """Losses of free-running training, what was seen, and validation at its end."""
    task = _start(config)
    loader = _loader(task)
    stream = iter(loader)
    losses, keys, captions, kinds = [], [], [], []
    for step in range(STEPS):
        batches = list(itertools.islice(stream, task.plan.accumulation_steps))
        keys += [key for batch in batches for key in batch.keys]
        captions += [caption for batch in batches for caption in batch.captions]
        kinds += [0 if b.cached is None else int(b.cached.sum()) for b in batches]
        losses.append(float(mean_over_ranks(task.accumulate(batches, step * 8)["loss"])))
        task.update(step * 8)
    with task.evaluating():
        figures = diffusion_product.validate(task)
    seen = {"keys": keys, "captions": captions, "cached": kinds, "bad": loader.bad_samples.names}
    return {"losses": losses, "validation": figures, **seen}


@pytest.fixture(scope="module")
def on_the_fly(folder: Path) -> dict[str, Any]:
    return run_ranks(_run, 1, _config(folder, "data"))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("manifest", "tolerance"), [rarely("whole", 1e-5), ("mixed", 1e-5), ("half", 1e-3)])
def test_cached_mixed_and_on_the_fly_training_agree_step_by_step(
    folder: Path, on_the_fly: dict[str, Any], manifest: str, tolerance: float
) -> None:
    (cached,) = run_ranks(_run, 1, _config(folder, manifest))
    assert cached["losses"] == pytest.approx(on_the_fly["losses"], rel=tolerance)
    # Absolute as well: the gap between one's own and another's caption is near 0 after few steps.
    assert cached["validation"] == pytest.approx(on_the_fly["validation"], rel=tolerance, abs=tolerance)
    assert (cached["keys"], cached["captions"]) == (on_the_fly["keys"], on_the_fly["captions"])
    assert (
        cached["bad"]
        == on_the_fly["bad"]
        == {"s0/005": "image does not decode", "s2/017": "caption is not text in UTF-8, UTF-16 or cp1252"}
    )
    assert on_the_fly["cached"] == [0] * STEPS
    assert sum(cached["cached"]) == (8 * STEPS if manifest != "mixed" else sum(k[:2] == "s0" for k in cached["keys"]))
    assert len({round(loss, 4) for loss in cached["losses"]}) == STEPS


def test_a_mixture_on_two_ranks_with_accumulation_is_the_same_training(
    folder: Path, on_the_fly: dict[str, Any]
) -> None:
    for result in run_ranks(_run, 2, _config(folder, "mixed", train={"micro_batch": 2})):
        assert result["losses"] == pytest.approx(on_the_fly["losses"], rel=1e-5)


def test_flips_fall_as_they_do_for_images(folder: Path, on_the_fly: dict[str, Any]) -> None:
    (images,) = run_ranks(_run, 1, _config(folder, "data", flip=True))
    (cached,) = run_ranks(_run, 1, _config(folder, "flips", flip=True))
    assert cached["losses"] == pytest.approx(images["losses"], rel=1e-5)
    assert images["losses"] != pytest.approx(on_the_fly["losses"], rel=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        rarely({"kind": "vq", "codebook_size": 16}),
        {"kind": "identity", "channel_multipliers": (1,), "latent_channels": 3},
    ],
)
def test_latents_that_are_points_are_cached_as_points(tmp_path: Path, kind: dict[str, Any]) -> None:
    make_dataset(tmp_path / "data", num_samples=16, samples_per_shard=8, resolution=20)
    other_artifact(tmp_path / "artifact", **kind)
    encode(tmp_path, "--dtype", "float32", "--max-shards", "1")
    images, mixed = (
        run_ranks(_run, 1, _config(tmp_path, manifest, autoencoder=kind))[0] for manifest in ("data", "cache")
    )
    assert 0 < sum(mixed["cached"]) < 8 * STEPS
    assert mixed["losses"] == pytest.approx(images["losses"], rel=1e-5)
    assert mixed["validation"] == pytest.approx(images["validation"], rel=1e-5)


def _validation_latents(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents that validation takes, and the modes of the same images' posteriors."""
    task = _start(config)
    images = dataclasses.replace(config.data, manifest=config.data.manifest.replace("whole", "data"))
    loader = build_loader(
        images, seed=0, global_batch=8, micro_batch=8, rank=0, world_size=1, augment=False, num_epochs=1
    )
    x = torch.cat([batch.images for batch in loader])
    batches, count = task.validation_batches(256)
    latents = torch.cat([task.encode(batch, mode=True) for batch in batches])[:count]
    return latents, task.autoencoder.encode(x)


@pytest.mark.parametrize("manifest", ["data", "whole"])
def test_validation_takes_modes(folder: Path, manifest: str) -> None:
    ((latents, modes),) = run_ranks(_validation_latents, 1, _config(folder, manifest))
    torch.testing.assert_close(latents, modes, atol=1e-5, rtol=1e-5)


def _losses_of_images(config: Config) -> list[float]:
    """The loss of each image over many steps, without training."""
    task = _start(config)
    losses: list[float] = []
    for batch in itertools.islice(_loader(task), 48):
        numbers = batch.image_numbers.tolist()
        z = task.encode(batch)
        t, noise, _ = task.draw(numbers)
        with torch.no_grad():
            output = task.network(task.process.add_noise(z, noise, t), t, task.inputs(batch))
        losses += task.process.loss(output, z, noise, t).tolist()
    return losses


def test_random_crops_of_the_cache_give_the_losses_of_random_crops(folder: Path) -> None:
    """Other crops of the same images under the same noise: equal in distribution, not one by one."""
    (images,) = run_ranks(_losses_of_images, 1, _config(folder, "data", flip=True, crop=0.6))
    (cached,) = run_ranks(_losses_of_images, 1, _config(folder, "crops", flip=True, crop=0.6))
    assert images != cached
    differences = np.array(cached) - np.array(images)
    assert np.abs(differences.mean()) < 4 * differences.std() / len(differences) ** 0.5
    assert stats.ks_2samp(images, cached).pvalue > 0.05


def _seen_variants(config: Config) -> list[torch.Tensor]:
    loader = build_loader(
        config.data, seed=0, global_batch=8, micro_batch=8, rank=0, world_size=1, accept_latents=True, num_epochs=32
    )
    return [moments for batch in loader if batch.moments is not None for moments in batch.moments]


def test_the_variant_is_a_function_of_seed_and_position_and_all_come(folder: Path) -> None:
    config = _config(folder, "crops", flip=True, crop=0.6)
    first = _seen_variants(config)
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(first, _seen_variants(workers), strict=True))
    assert len({moments.numpy().tobytes() for moments in first}) == 22 * 4


def _main_and_errors(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return main(["train", *arguments]), errors.getvalue()


@pytest.mark.rest
def test_a_run_that_was_started_on_images_goes_on_with_their_cache(folder: Path, tmp_path: Path) -> None:
    common = ["data.crop_scale_min=1", "train.log_every_images=8", "train.checkpoint_every_images=0"]
    common += ["optimizer.decay=constant", "train.validate_every_images=0"]

    def train(name: str, images: int, *more: str) -> str:
        arguments = stage2(folder, tmp_path / name, *common, f"train.total_images={images}", *more)
        ((status, errors),) = run_ranks(_main_and_errors, 1, arguments)
        assert status == 0, errors
        return errors

    train("images", 40)
    train("both", 16)
    (tmp_path / "both" / "result.json").unlink()
    errors = train("both", 40, f"data.manifest={folder / 'whole' / 'manifest.json'}")
    assert "continuing at 16 images" in errors
    files = [tmp_path / name / "metrics.jsonl" for name in ("images", "both")]
    rows = [[row["loss"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row] for path in files]
    assert len(rows[0]) == 5
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)
