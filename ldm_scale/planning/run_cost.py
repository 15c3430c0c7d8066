"""What a whole run takes on a cluster: scaling, checkpoints, failures, GPU-days, energy and money."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ldm_scale.config.schema import BatchPlan
from ldm_scale.planning.checkpoint_interval import best_interval_s, lost_share, mean_time_between_failures_s
from ldm_scale.planning.cluster import Cluster, resized
from ldm_scale.planning.efficiency import Software
from ldm_scale.planning.step_time import Job, StepTime, simulate

LARGEST_CLUSTER = 4096  # GPUs
# EDM2 trained on 32 A100 of 400 W for 5.3 days with 2.2 MWh (arXiv:2312.02696, Table 6, column S): 540 W a GPU, with
# its share of everything else that stands there.
WATTS_PER_GPU_WATT = 2.2e6 / (32 * 5.3 * 24) / 400
RESTART_S = 300.0  # an assumption: until a failed run trains again
HOST_COPY_RATE = 20e9  # bytes/s, an assumption: from GPU to pinned host memory, while training stands still


@dataclass(frozen=True)
class ScalingRow:
    """One size of cluster. Efficiency is images/s per GPU over that of the smallest size in the table."""

    num_gpus: int
    micro_batch: int
    accumulation_steps: int
    step_s: float
    images_per_s: float
    efficiency: float
    fits: bool = True  # into a GPU's memory


@dataclass(frozen=True)
class Checkpoints:
    """What saves cost. Units: bytes, seconds."""

    num_bytes: int  # of one, all ranks
    write_s: float
    stall_s: float  # of training, for a save
    expected_failures: float  # of the run
    mtbf_s: float
    best_interval_s: float
    lost_share: float  # of the time, to saves, lost work and restarts, at the best interval
    bytes_per_s: float  # to the storage, on average


@dataclass(frozen=True)
class RunCost:
    """The whole run, its losses included."""

    seconds: float
    gpu_days: float
    energy_kwh: float
    price: float | None  # in the currency of the rate that was given


def images_per_s(job: Job, cluster: Cluster, step: StepTime) -> float:
    """Of the whole cluster."""
    return job.images * cluster.num_gpus / step.total


def scaling(job: Job, cluster: Cluster, software: Software, strong: bool, global_batch: int) -> list[ScalingRow]:
    """From one GPU, and then whole nodes, doubling up to 4096 GPUs; the cluster itself is among them.

    Strong: the global batch stays, so that micro-batch x accumulation shrinks; sizes by which it does not divide are
    left out. Weak: a rank's work stays. The storage grows with the nodes, unless its rate was given.
    """
    rows: list[ScalingRow] = []
    for num_gpus in _sizes(cluster):
        here = job
        if strong:
            batches = _divided(global_batch, num_gpus, job.micro_batch)
            if batches is None:
                continue
            here = dataclasses.replace(
                job, micro_batch=batches.micro_batch, accumulation_steps=batches.accumulation_steps
            )
        part = resized(cluster, num_gpus)
        step = simulate(here, part, software)
        speed = images_per_s(here, part, step)
        first = rows[0].images_per_s / rows[0].num_gpus if rows else speed / num_gpus
        rows.append(
            ScalingRow(num_gpus, here.micro_batch, here.accumulation_steps, step.total, speed, speed / num_gpus / first)
        )
    return rows


def _sizes(cluster: Cluster) -> list[int]:
    """One GPU, whole nodes, and the cluster's own size among them."""
    doubled = [cluster.gpus_per_node * 2**n for n in range(LARGEST_CLUSTER.bit_length())]
    return sorted({1, cluster.num_gpus, *(size for size in doubled if size <= LARGEST_CLUSTER)})


def _divided(global_batch: int, ranks: int, most: int) -> BatchPlan | None:
    """The same global batch on so many ranks, in micro-batches of at most so many images."""
    if global_batch % ranks:
        return None
    per_rank = global_batch // ranks
    micro = next(n for n in range(min(most, per_rank), 0, -1) if per_rank % n == 0)
    return BatchPlan(micro, per_rank // micro, global_batch)


def checkpoints(state_bytes: int, asynchronous: bool, cluster: Cluster, seconds: float) -> Checkpoints:
    """Of a run of so many seconds whose checkpoint has so many bytes over all ranks."""
    write = state_bytes / cluster.storage
    stall = state_bytes / cluster.num_gpus / HOST_COPY_RATE if asynchronous else write
    mtbf = mean_time_between_failures_s(cluster.num_gpus)
    # A save beside training must end before the next one begins.
    interval = max(best_interval_s(stall, mtbf), write)
    return Checkpoints(
        num_bytes=state_bytes,
        write_s=write,
        stall_s=stall,
        expected_failures=seconds / mtbf,
        mtbf_s=mtbf,
        best_interval_s=interval,
        lost_share=lost_share(interval, stall, RESTART_S, mtbf),
        bytes_per_s=state_bytes / (interval + stall),
    )


def run_cost(
    total_images: int, speed: float, lost: float, cluster: Cluster, watts: float, price_per_gpu_hour: float | None
) -> RunCost:
    """Of a run at so many images/s that loses that share of its time.

    Units: `watts` of one GPU and its share of the machine.
    """
    seconds = total_images / speed / (1 - lost)
    gpu_hours = seconds * cluster.num_gpus / 3600
    price = None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour
    return RunCost(seconds, gpu_hours / 24, gpu_hours * watts / 1000, price)
