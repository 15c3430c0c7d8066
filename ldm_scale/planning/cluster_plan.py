"""`ldm-scale plan --gpu`: a configuration on a cluster, before any of it is paid for."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from dataclasses import dataclass

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import BatchPlan, Config, Recomputation
from ldm_scale.errors import ConfigError
from ldm_scale.planning.cluster import Cluster, Gpu
from ldm_scale.planning.efficiency import SOFTWARE, Software
from ldm_scale.planning.flops import STEP_FLOPS_PER_FORWARD, RunSize
from ldm_scale.planning.jobs import Workload, ranks_of
from ldm_scale.planning.memory import MASTER, MOMENTS, MemoryPlan
from ldm_scale.planning.recommend import WORKSPACE_BYTES, Recommendation, fits, largest_micro_batch, recommend
from ldm_scale.planning.run_cost import (
    WATTS_PER_GPU_WATT,
    Checkpoints,
    RunCost,
    ScalingRow,
    checkpoints,
    images_per_s,
    run_cost,
    scaling,
)
from ldm_scale.planning.step_time import Job, Precision, StepTime, simulate

AVERAGE = 4  # bytes of a number of an average


@dataclass(frozen=True)
class ClusterPlan:
    """What a configuration amounts to on a cluster, as it stands, and what would be better."""

    cluster: Cluster
    software: Software
    precision: Precision
    cached: bool
    batches: BatchPlan
    memory: MemoryPlan
    fits: bool
    largest_micro_batch: int  # as the configuration divides and recomputes; 0: not one image
    step: StepTime
    images_per_s: float
    mfu: float | None  # None in fp32, where no one peak stands for the GPU
    weak: list[ScalingRow]
    strong: list[ScalingRow]
    checkpoints: Checkpoints
    cost: RunCost
    recommendation: Recommendation | None
    recommended_job: Job | None

    @property
    def workspace(self) -> int:
        """Bytes that no tensor accounts for."""
        return WORKSPACE_BYTES


def plan_on_cluster(
    config: Config,
    size: RunSize,
    cluster: Cluster,
    *,
    precision: str = "auto",
    cached: bool = False,
    images: int | None = None,
    watts: float | None = None,
    price_per_gpu_hour: float | None = None,
) -> ClusterPlan:
    """The plan.

    Raises: ConfigError if the GPU has no bf16 and it was asked for, if the batch does not divide, if a budget of memory
        is too small, or of a cache in stage 1.
    """
    ranks = ranks_of(cluster, config)
    batches = batch_plan(config, ranks)
    numbers = _precision(config, cluster, precision)
    workload = Workload(config, size.latent_shape, numbers, cached)
    software = SOFTWARE[cluster.gpu.name]
    recomputed, stage = workload.configured(batches, ranks), config.zero.stage
    memory = workload.memory(batches, ranks, stage, recomputed)
    job = workload.job(batches, stage, recomputed)
    step = simulate(job, cluster, software)
    speed = images_per_s(job, cluster, step)
    total = config.train.total_images if images is None else images
    state_bytes = (MASTER + MOMENTS + AVERAGE * workload.averages) * workload.parameters
    state_bytes += 0 if job.rival is None else (MASTER + MOMENTS) * job.rival.parameters
    saves = checkpoints(state_bytes, config.train.async_checkpoints, cluster, total / speed)
    watts = cluster.gpu.watts * WATTS_PER_GPU_WATT if watts is None else watts
    best = recommend(workload, cluster, software)
    better = None if best is None else workload.job(best.choice.batches, best.choice.stage, best.choice.recomputed)
    scaled, gpu = better or job, cluster.gpu
    way = recomputed if best is None else best.choice.recomputed
    return ClusterPlan(
        cluster=cluster,
        software=software,
        precision=numbers,
        cached=cached,
        batches=batches,
        memory=memory,
        fits=fits(memory, cluster.gpu),
        largest_micro_batch=largest_micro_batch(
            workload, ranks, cluster.gpu, stage, recomputed, config.train.global_batch // ranks
        ),
        step=step,
        images_per_s=speed,
        mfu=_mfu(size, speed, cluster, numbers),
        weak=_judged(scaling(scaled, cluster, software, False, config.train.global_batch), workload, scaled, way, gpu),
        strong=_judged(scaling(scaled, cluster, software, True, config.train.global_batch), workload, scaled, way, gpu),
        checkpoints=saves,
        cost=run_cost(total, speed, saves.lost_share, cluster, watts, price_per_gpu_hour),
        recommendation=best,
        recommended_job=better,
    )


def _judged(
    rows: list[ScalingRow], workload: Workload, job: Job, recomputed: Recomputation | Set[str], gpu: Gpu
) -> list[ScalingRow]:
    """The rows, which know whether they fit into a GPU's memory."""
    found = []
    for row in rows:
        batches = BatchPlan(row.micro_batch, row.accumulation_steps, job.images * row.num_gpus)
        memory = workload.memory(batches, row.num_gpus, job.stage, recomputed)
        found.append(dataclasses.replace(row, fits=fits(memory, gpu)))
    return found


def _mfu(size: RunSize, speed: float, cluster: Cluster, precision: Precision) -> float | None:
    if precision == "fp32":
        return None
    return STEP_FLOPS_PER_FORWARD * size.trained_forward_flops * speed / (cluster.gpu.half_flops * cluster.num_gpus)


def _precision(config: Config, cluster: Cluster, asked: str) -> Precision:
    """Of the numbers that are computed with; auto is bf16 where the GPU has it."""
    wanted = config.train.precision if asked == "auto" else asked
    if wanted == "auto":
        return "bf16" if cluster.gpu.has_bf16 else "fp32"
    if wanted == "bf16" and not cluster.gpu.has_bf16:
        raise ConfigError(
            f"--gpu {cluster.gpu.name}: it has no bf16, in which this run would compute; give --precision fp32"
        )
    return "fp32" if wanted == "fp32" else "bf16"
