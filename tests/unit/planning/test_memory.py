"""What the plan says of memory, against bytes that were counted on real engines and real backward passes."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import (
    ConditioningConfig,
    Config,
    EmaConfig,
    KernelsConfig,
    Recomputation,
    UNetConfig,
    ZeroConfig,
)
from ldm_scale.engine import env
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.models.build import build_seeded
from ldm_scale.planning.activations import backward_peak
from ldm_scale.planning.live_bytes import LiveBytes
from ldm_scale.planning.memory import MemoryPlan, plan_memory
from tests.helpers.cases import rarely
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import UNET, tiny_config

LATENT = (3, 8, 8)
# Convolutions above and below what stage 3 keeps whole.
WIDE = UNetConfig(base_channels=96, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(), attention="self")


def _config(zero: dict[str, Any], precision: str = "fp32", **sections: Any) -> Config:
    train = {"precision": precision, "global_batch": 4, "async_checkpoints": False}
    config = tiny_config("diffusion", Path(), Path("run"), zero=zero, train=train, **sections)
    return dataclasses.replace(config, unet=WIDE, conditioning=ConditioningConfig())


def _planned(config: Config, ranks: int) -> MemoryPlan:
    return plan_memory(config, batch_plan(config, ranks), ranks, LATENT)


def _counted(config: Config) -> dict[str, int]:
    """Bytes that live after two steps: all, and of masters, moments and averages."""
    plan, here = batch_plan(config, env.read_launch().world_size), env.start(env.read_launch(), config.train)
    with LiveBytes("cpu") as live:
        network = build_seeded(lambda: LatentDiffusion(config.unet, config.conditioning, LATENT[0]), 0)
        model = ShardedModel(
            network,
            optimizer=config.optimizer,
            zero=config.zero,
            stage=config.zero.stage,
            micro_batch=plan.micro_batch,
            accumulation_steps=plan.accumulation_steps,
            environment=here,
        )
        ema = ShardedEma(model, config.ema)
        for step in range(2):
            z = torch.randn(plan.micro_batch, *LATENT)
            model.backward(model(z, torch.full((len(z),), 5), {}).float().square().mean())
            del z
            model.step(1e-3)
            ema.update(4 * (step + 1), 4)
        gc.collect()
    return {"all": live.now}


@pytest.mark.parametrize(
    ("ranks", "precision", "zero"),
    [
        (1, "fp32", {"stage": 0}),
        rarely(2, "bf16", {"stage": 0}),
        rarely(2, "fp32", {"stage": 1}),
        rarely(2, "bf16", {"stage": 2}),
        rarely(2, "fp32", {"stage": 2, "offload_optimizer": True}),
        rarely(2, "bf16", {"stage": 1, "offload_optimizer": True}),
        rarely(2, "fp32", {"stage": 3}),
        rarely(2, "bf16", {"stage": 3, "live_elements": 10_000}),
        (2, "bf16", {"stage": 3, "offload_optimizer": True, "offload_parameters": True}),
        rarely(4, "fp32", {"stage": 3}),
        rarely(4, "bf16", {"stage": 2}),
    ],
)
@pytest.mark.timeout(400)
def test_what_lies_between_steps(ranks: int, precision: str, zero: dict[str, Any]) -> None:
    config = _config(zero, precision, ema=dataclasses.asdict(EmaConfig(half_life_images=32.0, power_stds=(0.1,))))
    plan = _planned(config, ranks)
    del plan.device.held["autoencoder"]
    (counted, *_) = run_ranks(_counted, ranks, config, timeout_s=300.0)
    assert counted["all"] == pytest.approx(plan.device.total_held + plan.host.total_held, rel=0.01)


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_a_backward_pass(recomputed: Recomputation) -> None:
    config = tiny_config("diffusion", Path(), Path("run"), train={"activation_checkpointing": recomputed})
    batch = 64
    expected = backward_peak(config, batch, LATENT, torch.float32, 10**9)
    network = LatentDiffusion(UNET, config.conditioning, LATENT[0])
    network.unet.checkpoint_activations = recomputed
    inputs = {name: part.example(batch, LATENT[1:]) for name, part in network.conditioner.conditions.items()}
    z, t = torch.randn(batch, *LATENT), torch.zeros(batch, dtype=torch.int64)
    with LiveBytes("cpu") as live:
        network(z, t, inputs).float().square().mean().backward()
        torch.cat([x.grad.flatten() for x in network.parameters() if x.grad is not None])  # as for a reduction
    assert live.peak == pytest.approx(expected, rel=0.01)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, activation_checkpointing="none"))
    least = {"none": 1.0, "selective": 0.8, "full": 0.5}[recomputed]
    assert expected <= least * backward_peak(plain, batch, LATENT, torch.float32, 10**9)


def test_offloading_moves_states_to_the_host() -> None:
    plain, moved, all_moved = (
        _planned(_config({"stage": 3} | zero, "bf16"), 4)
        for zero in ({}, {"offload_optimizer": True}, {"offload_optimizer": True, "offload_parameters": True})
    )
    parameters = plain.device.held["moments"] * 4 // 8
    assert plain.host.held == {}
    assert not {"masters", "moments", "averages", "gradients"} & moved.device.held.keys()
    assert moved.host.held["moments"] == plain.device.held["moments"]
    assert plain.device.total_held - moved.device.total_held == pytest.approx(parameters * (12 + 4 + 2) / 4, rel=1e-3)
    assert moved.device.held["weights"] == all_moved.host.held["weights"] == pytest.approx(parameters * 2 / 4, rel=1e-3)
    assert "weights" not in all_moved.device.held


def test_fewer_live_elements_gather_less() -> None:
    much, little = (_planned(_config({"stage": 3, "live_elements": n}), 2) for n in (10**9, 1_000))
    assert little.device.backward["weights gathered"] < 0.5 * much.device.backward["weights gathered"]
    assert little.device.total_held == much.device.total_held


def test_an_asynchronous_save_has_a_copy_in_host_memory() -> None:
    config = _config({"stage": 2}, ema={"half_life_images": 10.0})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, async_checkpoints=True))
    plan = _planned(config, 2)
    assert plan.host.held == {
        "copy that is written": sum(plan.device.held[name] for name in ("masters", "moments", "averages"))
    }


def test_both_engines_of_stage_1_count() -> None:
    config = tiny_config("autoencoder", Path(), Path("run"), zero=dataclasses.asdict(ZeroConfig(stage=2)))
    both = _planned(config, 2)
    alone = dataclasses.replace(config.autoencoder_loss, adversarial_weight=0.0)
    one = _planned(dataclasses.replace(config, autoencoder_loss=alone), 2)
    assert both.device.held["moments"] > one.device.held["moments"] > 0


def _on_cuda(config: Config, **train: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device="cuda", **train))


def test_a_cuda_graph_keeps_its_backward_pass_through_the_step() -> None:
    plain = _planned(_on_cuda(_config({"stage": 0}, "bf16")), 1).device
    graph = _planned(_on_cuda(_config({"stage": 0}, "bf16"), cuda_graphs=True), 1).device
    parameters = plain.held["masters"] // 4
    activations = plain.backward["activations and gradients"]
    assert graph.held == plain.held | {"CUDA graph's activations and gradients": activations}
    assert graph.backward == {"gradients copied out": 2 * parameters, "bucket": 2 * parameters}
    # The step: the copied gradients, and each in fp32.
    assert graph.peak == plain.total_held + activations + 6 * parameters
    assert plain.peak == plain.total_held + max(activations, 6 * parameters)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_keeps_what_fused_kernels_keep(precision: str) -> None:
    config = _config({"stage": 0}, precision)
    reference = dataclasses.replace(config, kernels=KernelsConfig(group_norm_silu="reference"))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    fused, plain = (backward_peak(config, 4, LATENT, dtype, 10**9, fused) for fused in (True, False))
    assert fused < plain
    key = "activations and gradients"
    assert _planned(_on_cuda(config), 1).device.backward[key] == fused
    assert _planned(config, 1).device.backward[key] == plain, "on a CPU"
    assert _planned(_on_cuda(reference), 1).device.backward[key] == plain
