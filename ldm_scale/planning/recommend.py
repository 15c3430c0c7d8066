"""Which ZeRO stage, micro-batch, accumulation and recomputation a cluster trains a configuration fastest with.

Every choice that fits into a GPU's memory is played through (`step_time.py`), and the fastest wins; of choices within
3% of it, which is less than the planner errs by, the one that divides and recomputes least. Recomputation costs a
second forward pass and buys nothing but memory, so it is looked at only where it makes a larger micro-batch possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from ldm_scale.config.schema import BatchPlan, Recomputation
from ldm_scale.planning.cluster import Cluster, Gpu
from ldm_scale.planning.efficiency import Software
from ldm_scale.planning.jobs import Workload
from ldm_scale.planning.memory import MemoryPlan
from ldm_scale.planning.step_time import StepTime, simulate

# Assumptions: a CUDA context of about half a GiB, as much for NCCL's buffers and for cuDNN's and cuBLAS's workspaces;
# and a twentieth of the memory that an allocator cannot use.
WORKSPACE_BYTES = int(1.5 * 2**30)
USABLE_SHARE = 0.95
SAME_SPEED = 0.03
_STAGES = (0, 1, 2, 3)
_RECOMPUTED: tuple[Recomputation, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Choice:
    """One way to divide a step, its time and its memory."""

    stage: int
    recomputed: Recomputation
    batches: BatchPlan
    step: StepTime
    memory_bytes: int  # workspace included


@dataclass(frozen=True)
class Recommendation:
    """The choice and why."""

    choice: Choice
    reasons: list[str]


def fits(memory: MemoryPlan, gpu: Gpu) -> bool:
    """Whether a rank has room on the GPU."""
    return memory.device.peak + WORKSPACE_BYTES <= USABLE_SHARE * gpu.memory


def divisors(count: int) -> list[int]:
    """Of a number, from the largest on."""
    return [n for n in range(count, 0, -1) if count % n == 0]


def largest_micro_batch(
    workload: Workload, ranks: int, gpu: Gpu, stage: int, recomputed: Recomputation | Set[str], per_rank: int
) -> int:
    """The most images that a rank can take at once, of those that divide its share of a step; 0 if not even one."""
    for images in divisors(per_rank):
        plan = BatchPlan(images, per_rank // images, per_rank * ranks)
        if fits(workload.memory(plan, ranks, stage, recomputed), gpu):
            return images
    return 0


def recommend(workload: Workload, cluster: Cluster, software: Software) -> Recommendation | None:
    """The fastest choice that fits; None where none does."""
    choices = list(_choices(workload, cluster, software))
    if not choices:
        return None
    fastest = min(choice.step.total for choice in choices)
    good = [choice for choice in choices if choice.step.total <= fastest * (1 + SAME_SPEED)]
    best = min(good, key=lambda choice: (_RECOMPUTED.index(choice.recomputed), choice.stage, choice.step.total))
    return Recommendation(best, _reasons(best, choices, cluster, workload.config.zero.offload_optimizer))


def _choices(workload: Workload, cluster: Cluster, software: Software) -> Iterator[Choice]:
    ranks, gpu = cluster.num_gpus, cluster.gpu
    per_rank = workload.config.train.global_batch // ranks
    offloads = workload.config.zero.offload_optimizer  # which there is from stage 1 on, and parameters at 3 alone
    least = 3 if workload.config.zero.offload_parameters else 1 if offloads else 0
    for stage in _STAGES[least:] if ranks > 1 else _STAGES[least : least + 1]:
        before = 0
        for recomputed in _RECOMPUTED:
            images = largest_micro_batch(workload, ranks, gpu, stage, recomputed, per_rank)
            if images > before:
                batches = BatchPlan(images, per_rank // images, per_rank * ranks)
                step = simulate(workload.job(batches, stage, recomputed), cluster, software)
                memory = workload.memory(batches, ranks, stage, recomputed).device.peak + WORKSPACE_BYTES
                yield Choice(stage, recomputed, batches, step, memory)
                before = images
            if before == per_rank:
                break


def _reasons(best: Choice, choices: list[Choice], cluster: Cluster, offloads: bool) -> list[str]:
    """Why, in sentences without a full stop."""
    reasons = []
    micro, gib = best.batches.micro_batch, best.memory_bytes / 2**30
    reasons.append(
        f"micro-batch {micro}: the largest divisor of a rank's images that fits, {gib:.1f} of "
        f"{USABLE_SHARE * cluster.gpu.memory / 2**30:.1f} GiB"
    )
    others = [choice for choice in choices if choice.stage != best.stage]
    if others:
        other = min(others, key=lambda choice: choice.step.total)
        percent = 100 * (other.step.total / best.step.total - 1)
        said = f"{abs(percent):.1f}% {'more' if percent >= 0 else 'less'} time"
        tie = ", which is less than the plan errs by: the one that divides least is taken" if percent < 0 else ""
        reasons.append(f"ZeRO stage {best.stage}: the next best, stage {other.stage}, takes {said}{tie}")
    tried = {choice.stage for choice in choices}
    missing = [stage for stage in _STAGES if cluster.num_gpus > 1 and stage not in tried and not offloads]
    if missing:
        reasons.append(f"stage {', '.join(map(str, missing))}: not even one image fits")
    if best.recomputed == "none":
        reasons.append("nothing is recomputed: it would cost time and make nothing possible that is faster")
    else:
        reasons.append(f"recomputation {best.recomputed}: its memory makes the larger micro-batch possible")
    return reasons
