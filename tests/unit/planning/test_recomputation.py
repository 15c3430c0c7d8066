"""A budget of memory recomputes the cheapest blocks that suffice; what really lives at the peak keeps to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config, KernelsConfig
from ldm_scale.errors import ConfigError
from ldm_scale.models.build import build_seeded
from ldm_scale.planning.jobs import Workload
from ldm_scale.planning.live_bytes import LiveBytes
from ldm_scale.planning.memory import blocks_to_recompute, plan_memory
from ldm_scale.planning.recomputation import GIB, MetaPass, block_costs, within_budget
from tests.helpers.runs import UNET, set_random_outputs, tiny_config

LATENT, BATCH = (3, 16, 16), 32
DEEP = dataclasses.replace(UNET, num_res_blocks=2)


def _config(budget_gib: float | None = None, stage: str = "diffusion") -> Config:
    train = {"global_batch": BATCH, "async_checkpoints": False, "memory_budget_gib": budget_gib}
    train["activation_checkpointing"] = "none" if budget_gib is None else "budget"
    return dataclasses.replace(tiny_config(stage, Path(), Path("run"), train=train), unet=DEEP)


def _meta(config: Config) -> MetaPass:
    return MetaPass(config, BATCH, LATENT, torch.float32, 10**9)


def _peak(config: Config) -> int:
    memory = plan_memory(config, batch_plan(config, 1), 1, LATENT)
    return memory.device.peak + memory.host.peak


def test_what_lives_at_the_peak_keeps_to_the_budget() -> None:
    config = _config()
    meta = _meta(config)
    none, full = meta.backward_peak("none"), meta.backward_peak("full")
    sizes = []
    for share in (0.0, 0.9):
        room = round(full + share * (none - full))
        choice = within_budget(meta, room / GIB, others=0, updating=0)
        network = build_seeded(lambda: LatentDiffusion(DEEP, config.conditioning, LATENT[0]), 0)
        network.unet.checkpoint_activations = choice.blocks
        inputs = {name: part.example(BATCH, LATENT[1:]) for name, part in network.conditioner.conditions.items()}
        z, t = torch.randn(BATCH, *LATENT), torch.zeros(BATCH, dtype=torch.int64)
        with LiveBytes("cpu") as live:
            network(z, t, inputs).float().square().mean().backward()
            torch.cat([x.grad.flatten() for x in network.parameters() if x.grad is not None])
        assert live.peak <= room * 1.01
        assert live.peak == pytest.approx(choice.backward_peak, rel=0.01)
        sizes.append(len(choice.blocks))
    assert sizes == sorted(sizes, reverse=True), "the smaller the budget, the more is recomputed"
    assert 0 < sizes[-1] < sizes[0]


def test_blocks_are_taken_by_bytes_per_flop() -> None:
    config = _config()
    meta = _meta(config)
    costs = block_costs(meta)
    assert [cost.name for cost in costs] == (
        ["down.0.0", "down.0.1", "down.1.0", "down.1.1", "middle"]
        + [f"up.{level}.{index}" for level in (1, 0) for index in range(3)]
    )
    assert all(cost.freed_bytes > 0 and cost.flops > 0 for cost in costs)
    middle = next(cost for cost in costs if cost.name == "middle")
    # Two residual blocks of 32 channels at 8x8 pixels: two 3x3 convolutions each, and what attention adds.
    assert middle.flops > 4 * 2 * 9 * 32 * 32 * 8 * 8 * BATCH
    none, full = meta.backward_peak("none"), meta.backward_peak("full")
    few = within_budget(meta, (0.9 * none + 0.1 * full) / GIB, others=0, updating=0).blocks
    ranked = sorted(costs, key=lambda cost: cost.worth, reverse=True)
    assert few == {cost.name for cost in ranked[: len(few)]}


def test_the_planned_peak_is_below_the_budget_and_the_plan_names_the_blocks() -> None:
    whole = _peak(_config())
    config = _config(0.9 * whole / GIB)
    memory = plan_memory(config, batch_plan(config, 1), 1, LATENT)
    assert memory.device.peak + memory.host.peak <= 0.9 * whole
    assert memory.recomputed == blocks_to_recompute(config, batch_plan(config, 1), 1, LATENT)
    assert 0 < len(memory.recomputed) < 11
    generous = _config(2 * whole / GIB)
    assert plan_memory(generous, batch_plan(generous, 1), 1, LATENT).recomputed == frozenset()
    assert blocks_to_recompute(_config(), batch_plan(config, 1), 1, LATENT) == "none"


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    plain = _config()
    least = _peak(dataclasses.replace(plain, train=dataclasses.replace(plain.train, activation_checkpointing="full")))
    with pytest.raises(ConfigError, match=r"memory_budget_gib=.* with every block recomputed the plan still comes to"):
        _peak(_config(0.99 * least / GIB))
    with pytest.raises(ConfigError, match=r"the optimizer's step alone takes"):
        _peak(_config(0.01 * least / GIB))


def test_the_loss_is_the_same_to_the_last_bit_and_gradients_to_rounding() -> None:
    config = _config()
    network = build_seeded(lambda: LatentDiffusion(DEEP, config.conditioning, LATENT[0]), 0)
    set_random_outputs(network, seed=1)
    inputs = {name: part.example(4, LATENT[1:]) for name, part in network.conditioner.conditions.items()}
    z, t = torch.randn(4, *LATENT, generator=torch.Generator().manual_seed(2)), torch.arange(4)
    found: list[list[Tensor]] = []
    for recomputed in (frozenset(), frozenset({"down.0.1", "up.1.0", "middle"})):
        network.unet.checkpoint_activations = recomputed
        network.zero_grad()
        loss = network(z, t, inputs).square().mean()
        loss.backward()
        found.append([loss.detach(), *(x.grad.clone() for x in network.parameters() if x.grad is not None)])
    assert len(found[0]) == len(found[1])
    assert torch.equal(found[0][0], found[1][0])
    # Blocks that are computed again give their parts of the context's gradient in another order.
    kept, again = (torch.cat([gradient.flatten() for gradient in gradients[1:]]) for gradients in found)
    assert (kept - again).norm() <= 1e-6 * kept.norm()


@pytest.mark.rest
def test_a_gpus_budget_counts_the_kernels_of_a_gpu() -> None:
    """`plan`, `plan --gpu` and a run choose alike, and nothing is recomputed that fits as it is computed there."""

    def on_cuda(budget_gib: float | None) -> Config:
        config = _config(budget_gib)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, device="cuda", precision="bf16"))

    config = on_cuda(None)
    plan = batch_plan(config, 1)
    whole = plan_memory(config, plan, 1, LATENT).device.peak
    plain = dataclasses.replace(config, kernels=KernelsConfig(group_norm_silu="reference", geglu="reference"))
    between = (whole + plan_memory(plain, plan, 1, LATENT).device.peak) / 2
    assert between > whole
    enough, less = on_cuda(between / GIB), on_cuda(0.9 * whole / GIB)
    assert blocks_to_recompute(enough, plan, 1, LATENT) == frozenset()
    assert blocks_to_recompute(dataclasses.replace(enough, kernels=plain.kernels), plan, 1, LATENT)
    chosen = blocks_to_recompute(less, plan, 1, LATENT)
    assert chosen
    assert Workload(less, LATENT, "bf16", cached=True).configured(plan, 1) == chosen
    assert plan_memory(less, plan, 1, LATENT).device.peak <= 0.9 * whole
