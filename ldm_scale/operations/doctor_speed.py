"""How fast a machine is at what training asks of it: files, matrix products, one network's step, ranks' messages.

Each measurement is bounded in time and memory, and its temporary file has no name, so that nothing stays behind
however the process ends.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion, in_type
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.engine.env import Environment
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.models.classifier import LatentClassifier
from ldm_scale.models.fused import set_kernels
from ldm_scale.planning.flops import STEP_FLOPS_PER_FORWARD, RunSize

DISK_BYTES = 64 * 2**20
MATMUL_S = 1.0
STEPS, STEPS_S = 10, 20.0  # of the clock, whichever ends first
LARGEST_STEP_S = 6.0  # expected of a step; batches are halved until it is below
EXPECTED_SHARE = 0.25  # of the matrix products' speed that a step reaches, for that expectation
# Bytes a parameter: weight, gradient, two moments, in fp32.
TRAINING_BYTES = 16
ALL_REDUCE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class DiskSpeed:
    """Units: MiB/s."""

    write: float  # to the device: until fsync returns
    read: float  # after the kernel was asked to forget the file


@dataclass(frozen=True)
class StepSpeed:
    """A training step of one network on this rank."""

    batch: int
    seconds: float  # median
    images_per_s: float
    flops_per_s: float  # by what the plan counts
    steps: int


@dataclass(frozen=True)
class RanksSpeed:
    """All-reduce over all ranks."""

    gib_per_s: float  # bus bandwidth: bytes x 2 (n - 1) / n / seconds, comparable over numbers of ranks
    latency_us: float  # of one number


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def measure_disk(folder: Path, num_bytes: int = DISK_BYTES) -> DiskSpeed:
    """Speed of one file of `num_bytes` in `folder`, which is gone afterwards. Raises: OSError."""
    block = os.urandom(2**20)  # some file systems compress
    blocks = num_bytes // len(block)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(blocks):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        opened = time.perf_counter()
        while file.read(2**20):
            pass
        read = time.perf_counter()
    mib = blocks * len(block) / 2**20
    return DiskSpeed(write=mib / (written - started), read=mib / (read - opened))


def measure_matmul(device: torch.device, dtype: torch.dtype, seconds: float = MATMUL_S) -> float:
    """FLOP/s of the fastest of many square matrix products, what a network can hope for on this device."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    durations = _durations(lambda: torch.mm(a, a), device, 1000, seconds)
    return float(2 * side**3 / min(durations))


def choose_batch(config: Config, forward_flops: int, world_size: int, matmul_flops: float) -> int:
    """Images per step of the clock: the run's micro-batch, or as many as a step of a few seconds holds; 0 if none."""
    batch = batch_plan(config, world_size).micro_batch
    per_image = STEP_FLOPS_PER_FORWARD * forward_flops / (EXPECTED_SHARE * matmul_flops)
    while batch and batch * per_image > LARGEST_STEP_S:
        batch //= 2
    return batch


def measure_step(config: Config, size: RunSize, environment: Environment, batch: int) -> StepSpeed:
    """The clock of forward, backward and Adam of the trained network on noise; without losses, EMA, data or ZeRO.

    Where a GPU's memory does not hold the batch, smaller ones are tried.
    Raises: torch.cuda.OutOfMemoryError if it does not hold one image.
    """
    device, dtype = environment.device, environment.dtype
    while True:
        try:
            step = _training_step(config, size, device, dtype, batch)
            durations = _durations(step, device, STEPS, STEPS_S)
            break
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            torch.cuda.empty_cache()
    seconds = median(durations)
    flops = size.step_flops * batch
    return StepSpeed(batch, seconds, batch / seconds, flops / seconds, len(durations))


def _training_step(
    config: Config, size: RunSize, device: torch.device, dtype: torch.dtype, batch: int
) -> Callable[[], None]:
    """A step of the trained network on one batch of noise."""
    channels, height, width = size.latent_shape
    side = config.data.resolution
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    network: nn.Module
    inputs: tuple[Any, ...]
    if config.stage == "autoencoder":
        network = build_seeded(lambda: build_autoencoder(config.autoencoder), 0)
        inputs = (normal(batch, 3, side, side).clamp(-1, 1), normal(batch, channels, height, width))
    elif config.stage == "classifier":
        network = build_seeded(lambda: LatentClassifier(config.unet, config.classifier, channels), 0)
        inputs = (normal(batch, channels, height, width), torch.zeros(batch, dtype=torch.int64, device=device))
    else:
        model = build_seeded(lambda: LatentDiffusion(config.unet, config.conditioning, channels), 0)
        with device:
            t, conditions = torch.zeros(batch, dtype=torch.int64), model.conditioner.example(batch, (height, width))
        network, inputs = model, (normal(batch, channels, height, width), t, in_type(conditions, dtype))
    set_kernels(network, config.kernels)
    network.to(device, dtype)
    adam = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        output = network(*inputs)
        prediction = output[0] if isinstance(output, tuple) else output
        prediction.float().square().mean().backward()
        adam.step()
        adam.zero_grad()

    return step


def measure_ranks(environment: Environment, num_bytes: int = ALL_REDUCE_BYTES) -> RanksSpeed | None:
    """Bandwidth and latency of all-reduce; None on a single rank. Collective: all ranks."""
    ranks = environment.world_size
    if ranks == 1:
        return None
    large = torch.ones(num_bytes // 4, device=environment.device)
    small = torch.ones(1, device=environment.device)

    def seconds(x: Tensor, repetitions: int) -> float:
        # The same number on every rank: a bound in time would leave one rank waiting for the others.
        durations = _durations(lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX), environment.device, repetitions)
        return median(durations)

    bus = num_bytes * 2 * (ranks - 1) / ranks / seconds(large, 5)
    return RanksSpeed(gib_per_s=bus / 2**30, latency_us=seconds(small, 50) * 1e6)


def _durations(
    work: Callable[[], object], device: torch.device, repetitions: int, seconds: float = float("inf")
) -> list[float]:
    """Seconds of each repetition, at least one, after one that is not counted; ends when `seconds` have passed."""
    durations: list[float] = []
    begin = time.perf_counter()
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - started)
        if len(durations) > 1 and time.perf_counter() - begin > seconds:
            break
    return durations[1:]
