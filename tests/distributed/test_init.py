"""Runs that begin with given weights: exactly these at every ZeRO stage, recorded, and resumed without the source."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale import load_diffusion
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.data import Batch, build_loader
from ldm_scale.engine import env
from ldm_scale.engine.collectives import mean_over_ranks
from ldm_scale.engine.rank_files import read_manifest
from ldm_scale.interchange.artifact import read_artifact, read_diffusion_artifact
from ldm_scale.interchange.load import read_source
from ldm_scale.operations.train import train
from ldm_scale.training.autoencoder_step import AutoencoderTask
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.task import Task
from tests.helpers.cases import rarely
from tests.helpers.origins import autoencoder_origin, diffusion_origin
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import AUTOENCODER, CONDITIONING, tiny_artifact, tiny_config
from tests.helpers.sharded import masters, whole
from tests.helpers.shards import make_dataset

assert CONDITIONING.text is not None
UNDROPPED = dataclasses.replace(CONDITIONING, text=dataclasses.replace(CONDITIONING.text, drop_probability=0.0))
KINDS = {"kl": AUTOENCODER, "vq": dataclasses.replace(AUTOENCODER, kind="vq", codebook_size=64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init")
    make_dataset(path / "data", num_samples=24, resolution=20)
    tiny_artifact(path / "artifact")
    diffusion_origin(path / "origin", path / "artifact")
    return path


def _config(folder: Path, stage: str, init: Path, **sections: Any) -> Config:
    config = tiny_config(stage, folder / "data" / "manifest.json", folder / "run", **sections)
    return dataclasses.replace(config, init=str(init))


def _first_batch(config: Config, task: Task) -> Batch:
    loader = build_loader(
        config.data,
        seed=config.train.seed,
        global_batch=task.plan.global_batch,
        micro_batch=task.plan.micro_batch,
        rank=task.environment.rank,
        world_size=task.environment.world_size,
    )
    return next(iter(loader))


def _assert_has_weights_of(source: Path, task: Task, name: str) -> None:
    trained = task.trained[name]
    assert trained.ema is not None
    averages = whole(trained.model, trained.ema.averages["ema"])[0]
    held = masters(trained.model)
    expected = read_source(source).state
    assert held.keys() == averages.keys() == expected.keys()
    for key, given in expected.items():
        assert torch.equal(held[key], given), key
        assert torch.equal(averages[key], given), key
    assert trained.model.optimizer_steps == 0


def _first_losses(config: Config) -> tuple[float, float]:
    """Of the first step, and of the source itself at the same noised latents."""
    launch = env.read_launch()
    task = DiffusionTask(config, batch_plan(config, launch.world_size), env.start(launch, config.train))
    _assert_has_weights_of(Path(config.init), task, "diffusion")
    batch = _first_batch(config, task)
    loss = task.accumulate([batch], 0)["loss"]

    model = load_diffusion(config.init)
    z = task.encode(batch)
    t, noise, _ = task.draw(batch.image_numbers.tolist(), task.network.conditioner.num_uniforms, z.shape[1:])
    z_t = model.process.add_noise(z, noise, t)
    output = model(z_t, t, model.encode_conditioning(batch.captions))
    expected = model.process.loss(output, z, noise, t).mean()
    return float(mean_over_ranks(loss)), float(mean_over_ranks(expected))


@pytest.mark.parametrize(("ranks", "zero_stage"), [(2, 0), (2, 3), rarely(2, 2), rarely(1, 1)])
def test_the_first_loss_is_that_of_the_source(folder: Path, ranks: int, zero_stage: int) -> None:
    config = _config(folder, "diffusion", folder / "origin", zero={"stage": zero_stage}, conditioning=UNDROPPED)
    for loss, expected in run_ranks(_first_losses, ranks, config):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert abs(expected - 1.0) > 1e-3, "a network of zeros has a loss of 1: the comparison shows nothing"


def _start_rounded(config: Config) -> None:
    launch = env.read_launch()
    task = DiffusionTask(config, batch_plan(config, launch.world_size), env.start(launch, config.train))
    _assert_has_weights_of(Path(config.init), task, "diffusion")
    for parameter in task.network.parameters():
        assert parameter.dtype == torch.bfloat16


@pytest.mark.parametrize("zero_stage", [0, rarely(1), 2, rarely(3)])
def test_bfloat16_rounds_what_computes_and_not_the_masters(folder: Path, zero_stage: int) -> None:
    precision = {"precision": "bf16"}
    config = _config(folder, "diffusion", folder / "origin", zero={"stage": zero_stage}, train=precision)
    run_ranks(_start_rounded, 2, config)


def _train_run(config: Config) -> bool:
    return train(config, env.read_launch())


@pytest.mark.rest
def test_a_run_is_resumed_bit_for_bit_when_its_source_is_gone(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "origin", tmp_path / "origin")
    source_hash = read_diffusion_artifact(tmp_path / "origin").content_hash
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    cadence = {"total_images": 32, "checkpoint_every_images": 16}
    config = tiny_config(
        "diffusion", folder / "data" / "manifest.json", run, zero={"stage": 3}, train=cadence, sampling={"prompts": ()}
    )
    config = dataclasses.replace(config, init=str(tmp_path / "origin"), artifact=str(folder / "artifact"))
    assert run_ranks(_train_run, 2, config) == [True] * 2
    run.rename(unbroken)
    middle = unbroken / "checkpoints" / "images-0000000016"
    shutil.copytree(middle, run / "checkpoints" / middle.name)
    shutil.rmtree(tmp_path / "origin")
    assert run_ranks(_train_run, 2, config) == [True] * 2

    before, after = (read_manifest(path / "checkpoints" / "images-0000000032") for path in (unbroken, run))
    assert after["models"] == before["models"]
    assert {name: r["crc32"] for name, r in after["files"].items()} == {
        name: r["crc32"] for name, r in before["files"].items()
    }
    origin = {"path": config.init, "weights": "ema", "content_sha256": source_hash, "images": 4096}
    assert after["state"]["init"] == before["state"]["init"] == origin
    assert read_source(run).provenance["init"] == origin
    rows = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert (rows[0]["images"], rows[0]["init"], rows[0]["config"]["init"]) == (16, origin, config.init)


def _first_stage(config: Config) -> None:
    launch = env.read_launch()
    task = AutoencoderTask(config, batch_plan(config, launch.world_size), env.start(launch, config.train))
    held = masters(task.autoencoder)
    state = read_artifact(Path(config.init)).state
    assert held.keys() - state.keys() == {"output_logvar"}
    assert all(torch.equal(held[name], given) for name, given in state.items())
    if task.codebook is not None:
        buffers = task.trained["autoencoder"].buffers
        assert torch.equal(buffers["codebook/sums"], state["quantizer.codebook"])
        assert torch.equal(buffers["codebook/counts"], torch.ones(64))
    assert task.adversary is not None
    assert not task.adversary.felt(0)


@pytest.mark.parametrize(("kind", "zero_stage"), [("kl", 2), ("vq", 3)])
def test_a_first_stage_is_trained_on(tmp_path: Path, folder: Path, kind: str, zero_stage: int) -> None:
    origin = autoencoder_origin(tmp_path / "origin", KINDS[kind])
    loss = {"learned_variance": True, "reconstruction": "l2", "discriminator_start_images": 8}
    config = _config(
        folder,
        "autoencoder",
        origin,
        autoencoder=KINDS[kind],
        autoencoder_loss=loss | ({"codebook_update": "ema"} if kind == "vq" else {}),
        zero={"stage": zero_stage},
        train={"total_images": 16},
    )
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    run_ranks(_first_stage, 2, config)
    assert run_ranks(_train_run, 1, config) == [True]
    trained = read_artifact(tmp_path / "run" / "artifact")
    assert trained.provenance["init"]["content_sha256"] == read_artifact(origin).content_hash
    assert trained.content_hash != read_artifact(origin).content_hash
