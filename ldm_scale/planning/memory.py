"""Bytes that a rank holds for the networks that it trains: on its device, and in host memory.

What DeepSpeed 0.19 allocates at each ZeRO stage was read in its sources and counted on real engines (the tests count
again, byte for byte up to padding). With P parameters, N ranks, c bytes a number of the compute type:

    between steps       stage 0: 4P + 8P masters and moments, cP weights too unless they are the masters (fp32)
                        1, 2: cP weights, 12P/N masters and moments
                        3: cP/N weights, cP/N gradients, 12P/N; whole: the parameters below `PERSISTENT` elements
    offload_optimizer   masters, moments and averages go to the host, and 4P/N of gradients come there; at stages 1
                        and 2 also cP/N and the largest parameter twice (one on the device) to copy through
    averages            4P/N each (stage 0: 4P)

Of activations, what a GPU's fused kernels keep is counted, and plain operations' on a CPU or where `kernels.*` asks for
them. A CUDA graph keeps the memory of its backward pass, gradients included, between the steps; the gradients that are
copied out of it come on top.

A backward pass adds activations, gradients, a bucket of them put side by side for the reduction; at stage 3 gathered
parameters as `zero.live_elements` allows. A step adds its gradients as one fp32 tensor. The peak is the larger of both.

Not counted: the framework and its kernels (a CUDA context is about half a GiB, a process on a CPU about 0.7), batches,
frozen text encoders and perceptual nets, what allocators keep in reserve. Of stage 1, activations are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.conditioning.open_clip_models import text_tower_parameters
from ldm_scale.config.schema import AutoencoderConfig, BatchPlan, Config, Recomputation, ZeroConfig
from ldm_scale.models.build import build_autoencoder
from ldm_scale.models.classifier import LatentClassifier
from ldm_scale.planning.activations import backward_peak, takes_fused
from ldm_scale.planning.recomputation import Choice, MetaPass, within_budget
from ldm_scale.planning.stage_1 import make_discriminator, perceptual_net

PERSISTENT = 100_000  # elements; DeepSpeed's stage3_param_persistence_threshold
STAGE_0_BUCKET = 500_000_000  # elements of a reduction at stage 0, which no key sets
MASTER, MOMENTS, FP32 = 4, 8, 4


@dataclass
class Memory:
    """Bytes of one rank by what they are for, in one place."""

    held: dict[str, int] = field(default_factory=dict)  # between steps
    backward: dict[str, int] = field(default_factory=dict)  # besides, at the peak of a backward pass
    update: dict[str, int] = field(default_factory=dict)  # besides, at the peak of the optimizer's step

    @property
    def total_held(self) -> int:
        """Between steps."""
        return sum(self.held.values())

    @property
    def peak(self) -> int:
        """The most at once in a step."""
        return self.total_held + max(sum(self.backward.values()), sum(self.update.values()))


@dataclass
class MemoryPlan:
    """One rank's memory. On a CPU both places are the same one, and what counts is the sum."""

    ranks: int
    stage: int  # of ZeRO
    compute_bytes: int  # a number: 2 in bf16, 4 in fp32
    device: Memory = field(default_factory=Memory)
    host: Memory = field(default_factory=Memory)
    recomputed: Recomputation | Set[str] = "none"  # in backward: a rule, or the blocks that a budget has chosen


# ZeRO's stage, elements of each parameter, and whether they are averaged, of all networks that are trained.
NetworkSizes = list[tuple[int, list[int], bool]]


def plan_memory(
    config: Config,
    plan: BatchPlan,
    ranks: int,
    latent_shape: tuple[int, int, int],
    backward: int | None = None,
    networks: NetworkSizes | None = None,
) -> MemoryPlan:
    """What one of so many ranks holds. Nothing is allocated.

    train.device=auto counts as CUDA, so that train.precision=auto is bf16 and kernels are fused. `backward` is the peak
    of a backward pass and `networks` those that are trained, where they are known already.
    Raises: ConfigError if train.memory_budget_gib is less than it takes with every block recomputed.
    """
    precision, on_cpu = config.train.precision, config.train.device == "cpu"
    compute = FP32 if precision == "fp32" or (precision == "auto" and on_cpu) else 2
    averages = len(config.ema.power_stds) + (config.ema.half_life_images > 0)
    result = MemoryPlan(ranks, config.zero.stage, compute)
    networks = networks or network_sizes(config, latent_shape[0])
    for stage, sizes, is_averaged in networks:
        zero, accumulates = config.zero, plan.accumulation_steps > 1
        _add_states(result, sizes, stage, zero, averages if is_averaged else 0, accumulates)
        _add_buffers(result, sizes, stage, zero, accumulates, on_cpu)
    if config.stage != "autoencoder":
        _add(result.device.held, "autoencoder", compute * _autoencoder_parameters(config.autoencoder))
    if config.stage == "diffusion" and config.conditioning.frozen_text is not None:
        tower = text_tower_parameters(config.conditioning.frozen_text.model)
        _add(result.device.held, "frozen text encoder", compute * tower)
    if config.stage == "autoencoder" and (perceptual := perceptual_net(config.autoencoder_loss)) is not None:
        _add(result.device.held, "perceptual net", FP32 * sum(weight.numel() for weight in perceptual.parameters()))
    if config.train.async_checkpoints:
        states = ("masters", "moments", "averages")
        copied = sum(place.held.get(name, 0) for place in (result.device, result.host) for name in states)
        _add(result.host.held, "copy that is written", copied)
    result.recomputed = config.train.activation_checkpointing
    if config.stage == "autoencoder" and config.autoencoder.kind == "identity":
        backward = 0  # nothing is trained
    if backward is None:
        bucket = STAGE_0_BUCKET if config.zero.stage == 0 else config.zero.bucket_elements
        dtype = torch.float32 if compute == FP32 else torch.bfloat16
        fused = not on_cpu and takes_fused(config.kernels)
        if config.train.activation_checkpointing == "budget":
            meta = MetaPass(config, plan.micro_batch, latent_shape, dtype, bucket, fused)
            choice = _within_budget(meta, config, result, on_cpu)
            result.recomputed, backward = choice.blocks, choice.backward_peak
        else:
            backward = backward_peak(config, plan.micro_batch, latent_shape, dtype, bucket, fused)
    _add_pass(result, backward, sum(sum(sizes) for _, sizes, _ in networks), config.train.cuda_graphs)
    return result


def _add_pass(plan: MemoryPlan, peak: int, parameters: int, in_a_graph: bool) -> None:
    """Activations and gradients: of a backward pass, or of one in a CUDA graph, which keeps them (at stage 0 alone)."""
    if not in_a_graph or plan.stage > 0:
        _add(plan.device.backward, "activations and gradients", peak)
        return
    _add(plan.device.held, "CUDA graph's activations and gradients", peak)
    _add(plan.device.backward, "gradients copied out", plan.compute_bytes * parameters)
    _add(plan.device.backward, "bucket", plan.compute_bytes * min(parameters, STAGE_0_BUCKET))


def _within_budget(meta: MetaPass, config: Config, plan: MemoryPlan, on_cpu: bool) -> Choice:
    """What a plan that has everything else recomputes; on a CPU both places are the same one."""
    assert config.train.memory_budget_gib is not None, "validated"
    held = plan.device.total_held + (plan.host.total_held if on_cpu else 0)
    others, updating = (held + sum(peak.values()) for peak in (plan.device.backward, plan.device.update))
    return within_budget(meta, config.train.memory_budget_gib, others, updating)


def blocks_to_recompute(
    config: Config, plan: BatchPlan, ranks: int, latent_shape: tuple[int, int, int]
) -> Recomputation | Set[str]:
    """What a run recomputes, for `UNet.checkpoint_activations`: its rule, or the blocks that its budget asks for.

    Raises: ConfigError as `plan_memory`.
    """
    if config.train.activation_checkpointing != "budget":
        return config.train.activation_checkpointing
    return plan_memory(config, plan, ranks, latent_shape).recomputed


@functools.cache
def _autoencoder_parameters(config: AutoencoderConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_autoencoder(config).parameters())


def network_sizes(config: Config, latent_channels: int) -> NetworkSizes:
    """Of all networks that are trained."""
    return [
        # an identity has no parameters
        (stage, [parameter.numel() for parameter in network.parameters()] or [0], is_averaged)
        for stage, network, is_averaged in _networks(config, latent_channels)
    ]


def _networks(config: Config, latent_channels: int) -> list[tuple[int, nn.Module, bool]]:
    """ZeRO's stage, the network, and whether it is averaged, of all that are trained."""
    with torch.device("meta"):
        if config.stage == "diffusion":
            network: nn.Module = LatentDiffusion(config.unet, config.conditioning, latent_channels)
        elif config.stage == "classifier":
            network = LatentClassifier(config.unet, config.classifier, latent_channels)
        else:
            network = build_autoencoder(config.autoencoder)
        networks = [(config.zero.stage, network, True)]
        loss = config.autoencoder_loss
        if config.stage == "autoencoder" and loss.adversarial_weight > 0:
            networks.append((config.zero.discriminator_stage, make_discriminator(loss), False))
    return networks


def _add_states(
    plan: MemoryPlan, sizes: Sequence[int], stage: int, zero: ZeroConfig, averages: int, accumulates: bool
) -> None:
    """What lies between steps."""
    compute, total = plan.compute_bytes, sum(sizes)
    part = total if stage == 0 else -(-total // plan.ranks)
    device, host = plan.device.held, plan.host.held
    offloads = zero.offload_optimizer and stage > 0
    states = host if offloads else device
    _add(states, "masters", MASTER * part)
    _add(states, "moments", MOMENTS * part)
    _add(states, "averages", FP32 * averages * part)
    if stage == 3:
        _add(host if zero.offload_parameters else device, "weights", compute * part)
        _add(states, "gradients", compute * part)
        if plan.ranks > 1:
            _add(device, "weights kept whole", compute * sum(size for size in sizes if size < PERSISTENT))
    elif stage > 0 or compute != FP32:
        _add(device, "weights", compute * total)
    if offloads:
        _add(host, "gradients", FP32 * part)
        if stage < 3:
            _add(host, "copies", compute * (part + max(sizes) + (part if accumulates else 0)))
            _add(device, "copies", compute * max(sizes))


def _add_buffers(
    plan: MemoryPlan, sizes: Sequence[int], stage: int, zero: ZeroConfig, accumulates: bool, on_cpu: bool
) -> None:
    """What comes and goes beside activations, and gradients as far as they are not among them."""
    compute, total = plan.compute_bytes, sum(sizes)
    part = total if stage == 0 else -(-total // plan.ranks)
    offloads = zero.offload_optimizer and stage > 0
    backward, update = plan.device.backward, plan.device.update
    if stage == 0:
        _add(update, "gradients", (compute if compute == FP32 else compute + FP32) * total)
        return
    bucket = zero.bucket_elements
    if not on_cpu:  # contiguous_gradients: buckets of that size from the start, two where communication overlaps
        _add(backward, "buckets", compute * bucket * (2 if zero.overlap_comm else 1))
    if stage < 3 and total > bucket and not offloads:
        _add(backward, "gradients kept", compute * part)
    if stage == 1 and accumulates:
        _add(backward, "gradients of the micro-batches", compute * total)
    if stage == 3 and plan.ranks > 1:
        large = [size for size in sizes if size >= PERSISTENT]
        gathered = min(sum(large), zero.live_elements + max(large, default=0))
        _add(backward, "weights gathered", compute * gathered)
    if not offloads:
        flat = compute * part if stage == 3 else 2 * compute * part  # as they were kept, and side by side
        _add(update, "gradients", flat + (0 if compute == FP32 else FP32 * part))


def _add(items: dict[str, int], name: str, count: int) -> None:
    if count:
        items[name] = items.get(name, 0) + count
