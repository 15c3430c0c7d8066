"""Stage 1's micro-batch on the meta device, held against the step that trains: its FLOPs and its memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.engine import env
from ldm_scale.planning.live_bytes import LiveBytes
from ldm_scale.planning.memory import network_sizes, plan_memory
from ldm_scale.planning.stage_1 import has_adversary, perceptual_net
from ldm_scale.planning.trace import trace_step
from ldm_scale.training.autoencoder_step import AutoencoderTask
from tests.helpers.batches import make_batch
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import AUTOENCODER, tiny_config

RESOLUTION = 32
LATENT = (3, 16, 16)
KINDS = {
    "kl": ({}, {"perceptual_weight": 1.0}),
    "vq": ({"kind": "vq", "codebook_size": 12}, {"codebook_update": "gradient", "chroma_weight": 0.5}),
    "no discriminator": ({}, {"adversarial_weight": 0.0, "learned_variance": True}),
    "penalties": ({}, {"r1_weight": 1.0, "reconstruction": "l2"}),
}


def _config(kind: str, micro_batch: int, **train: Any) -> Config:
    autoencoder, loss = KINDS[kind]
    sizes = {"global_batch": micro_batch, "async_checkpoints": False, "precision": "fp32"}
    config = tiny_config(
        "autoencoder",
        Path("unused"),
        Path("unused"),
        data={"resolution": RESOLUTION},
        autoencoder_loss=loss,
        train=sizes | train,
        ema={"half_life_images": 0.0},
    )
    return dataclasses.replace(config, autoencoder=dataclasses.replace(AUTOENCODER, **autoencoder))


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Of convolutions and products; FlopCounterMode's hooks on modules do not bear `torch.autograd.grad`."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None and "attention" not in str(func):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _counted(config: Config) -> tuple[float, int]:
    """FLOPs of convolutions and products of a real micro-batch, and the most bytes that lived in it."""
    environment = env.start(env.read_launch(), config.train)
    batch = make_batch(torch.rand(config.train.global_batch, 3, RESOLUTION, RESOLUTION))
    with LiveBytes("cpu") as live:
        task = AutoencoderTask(config, batch_plan(config, 1), environment)
        live.reset_peak()
        with _Flops() as counter:
            task.accumulate([batch], 0)
    return counter.total, live.peak


@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_is_the_step_that_trains(kind: str) -> None:
    config = _config(kind, 4)
    ((flops, peak),) = run_ranks(_counted, 1, config)
    trace = trace_step(config, LATENT, torch.float32, fused=False)
    planned = sum(operation.flops.of(4) for operation in trace.operations if operation.kind != "attention")
    assert planned == pytest.approx(flops, rel=0.01)
    plan = plan_memory(config, batch_plan(config, 1), 1, LATENT)
    assert plan.device.total_held + sum(plan.device.backward.values()) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_phases_and_gradients(kind: str, fused: bool) -> None:
    config = _config(kind, 4)
    trace = trace_step(config, LATENT, torch.bfloat16, fused)
    assert {operation.phase for operation in trace.operations} == {"forward", "losses", "backward", "discriminator"}
    (_, sizes, _), _ = network_sizes(config, LATENT[0])
    assert sum(getattr(event, "elements", 0) for event in trace.events) == sum(sizes)
    wide = {operation.phase for operation in trace.operations if operation.wide and operation.flops.of(1)}
    assert "losses" in wide, "the perceptual net and the losses' weights are computed in fp32"
    assert "backward" not in wide


def test_recomputation_takes_less_memory_and_more_time() -> None:
    none, full = (
        trace_step(_config("kl", 4, activation_checkpointing=what), LATENT, torch.bfloat16, fused=True)
        for what in ("none", "full")
    )
    assert full.peak(64, 2, 10**9) < 0.8 * none.peak(64, 2, 10**9)
    assert full.flops(4) > 1.1 * none.flops(4)


def test_a_discriminator_that_is_never_felt_takes_nothing() -> None:
    config = _config("kl", 4)
    late = dataclasses.replace(config.autoencoder_loss, discriminator_start_images=config.train.total_images)
    never = dataclasses.replace(config, autoencoder_loss=late)
    assert (has_adversary(config), has_adversary(never)) == (True, False)
    trace = trace_step(never, LATENT, torch.bfloat16, fused=True)
    assert "discriminator" not in {operation.phase for operation in trace.operations}


def test_lpips_needs_no_weights_to_be_planned() -> None:
    """VGG16's convolutions up to relu5_3: 14,714,688 weights and biases (arXiv:1409.1556, configuration D)."""
    loss = dataclasses.replace(_config("kl", 4).autoencoder_loss, perceptual_net="lpips_vgg", perceptual_weights="no")
    network = perceptual_net(loss)
    assert network is not None
    assert sum(weight.numel() for weight in network.parameters()) == 14_714_688
    assert network(torch.empty(2, 3, 32, 32, device="meta"), torch.empty(2, 3, 32, 32, device="meta")).shape == (2,)
