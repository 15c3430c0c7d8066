"""Whole networks trained with the Triton kernels, in the interpreter, against the same training in plain torch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_kernels.common import launch

if not launch.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1, which interprets the kernels on the CPU", allow_module_level=True)

from deepspeed.utils import safe_get_full_grad

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config, KernelsConfig
from ldm_scale.data import build_loader
from ldm_scale.engine import env
from ldm_scale.engine.collectives import mean_over_ranks
from ldm_scale.models.build import build_autoencoder, build_unet
from ldm_scale.models.convolution import Conv2d
from ldm_scale.models.fused import Attention, set_kernels
from ldm_scale.training.autoencoder_step import AutoencoderTask
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.task import Task
from tests.helpers.kernels import other_layouts
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import AUTOENCODER, UNET, set_random_outputs, tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset

STEPS = 16  # of two images each; the interpreter takes a second and more for one
KERNELS = ("group_norm_silu", "attention", "geglu", "ema_update")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels")
    make_dataset(path / "data", num_samples=24, resolution=20)
    tiny_artifact(path / "artifact")
    return path


def _config(folder: Path, stage: str, zero_stage: int, backend: str, **sections: Any) -> Config:
    sections |= {"kernels": dict.fromkeys(KERNELS, backend), "zero": {"stage": zero_stage}}
    return tiny_config(stage, folder / "data" / "manifest.json", folder / "run", **sections)


def _start(config: Config) -> tuple[Task, Any]:
    launch._outcomes.clear()  # those of tests that ran before the fork
    rank_launch = env.read_launch()
    environment = env.start(rank_launch, config.train)
    plan = batch_plan(config, rank_launch.world_size)
    task = (AutoencoderTask if config.stage == "autoencoder" else DiffusionTask)(config, plan, environment)
    loader = build_loader(
        config.data,
        seed=config.train.seed,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
    )
    return task, iter(loader)


def _paths_taken() -> dict[str, set[str]]:
    taken: dict[str, set[str]] = {}
    for operation, path in launch.outcomes():
        taken.setdefault(operation, set()).add(path.split()[0])
    return taken


def _train(config: Config) -> dict[str, Any]:
    """Losses of a free run, the average of the weights at its end, and the implementations that ran."""
    task, stream = _start(config)
    batch = config.train.global_batch
    losses = []
    for step in range(STEPS):
        metrics = task.accumulate(list(itertools.islice(stream, task.plan.accumulation_steps)), step * batch)
        losses.append(float(mean_over_ranks(metrics["loss"])))
        task.update(step * batch)
    ema = task.trained["diffusion"].ema
    assert ema is not None
    return {"losses": losses, "ema": [value.clone() for value in ema.averages["ema"]], "paths": _paths_taken()}


@pytest.mark.timeout(600)
def test_diffusion_trains_the_same_under_zero_2_on_two_ranks(folder: Path) -> None:
    # A program of a kernel takes milliseconds in the interpreter, so the UNet is as small as has one of each layer.
    tiny = {"unet": {"channel_multipliers": (1,), "attention_levels": ()}, "train": {"global_batch": 2}}
    plain = run_ranks(_train, 2, _config(folder, "diffusion", 2, "reference", **tiny), timeout_s=300)
    fused = run_ranks(_train, 2, _config(folder, "diffusion", 2, "triton", **tiny), timeout_s=500)
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        for average, expected in zip(ours["ema"], theirs["ema"], strict=True):
            torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-4)
        assert ours["paths"] == {name: {"triton"} for name in KERNELS}, "a kernel of this test did not run"
        assert "triton" not in set.union(*theirs["paths"].values())
    assert plain[0]["losses"][-1] < plain[0]["losses"][0], "the training taught nothing: the comparison shows little"


def _one_step(config: Config) -> dict[str, torch.Tensor]:
    """The autoencoder's and the discriminator's full gradients of the first step, from fixed weights."""
    task, stream = _start(config)
    assert isinstance(task, AutoencoderTask)
    # Rounding alone comes to 0.7e-5 with these weights, and to 1.3e-5 with others whose sums cancel more.
    set_random_outputs(task.network, seed=5)
    task.accumulate(list(itertools.islice(stream, task.plan.accumulation_steps)), 0)
    gradients = {}
    for name, trained in task.trained.items():
        for parameter_name, parameter in trained.model.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None, f"{name}.{parameter_name} has no gradient"
            gradients[f"{name}.{parameter_name}"] = gradient.clone()
    assert _paths_taken()["group_norm_silu"] == {config.kernels.group_norm_silu}
    return gradients


def test_one_autoencoder_step_has_the_same_gradients(folder: Path) -> None:
    steps = {
        name: run_ranks(_one_step, 1, _config(folder, "autoencoder", 0, name))[0] for name in ("triton", "reference")
    }
    assert any(name.endswith("channel_bias") for name in steps["reference"])
    for name, expected in steps["reference"].items():
        error = (steps["triton"][name] - expected).norm()
        assert error <= 1e-5 * expected.norm() + 1e-9, f"{name}: {error} of {expected.norm()}"


def test_networks_stay_in_channels_last_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv2d, "_weight_is_larger", lambda self, x: False)  # as on a GPU
    unet, autoencoder = build_unet(UNET, 3, 3, 16), build_autoencoder(AUTOENCODER)
    for network in (unet, autoencoder):
        set_random_outputs(network, seed=1)
        set_kernels(network, KernelsConfig(group_norm_silu="triton", attention="triton", geglu="triton"))
    assert (
        other_layouts(unet, torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16), ignore=Attention) == []
    )
    assert other_layouts(autoencoder, torch.randn(1, 3, 16, 16), torch.randn(1, 3, 8, 8), ignore=Attention) == []
