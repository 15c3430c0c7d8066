"""Seconds of one optimizer step on one rank of a cluster, by playing it through.

Three things happen side by side, each in order: the GPU computes, the network carries buckets, and the loader reads the
next batch. The GPU goes through the recorded operations of the step (`trace.py`). Whenever a gradient is whole it joins
a bucket, and a full bucket is handed to the network, which carries one at a time. What the GPU has to wait for at the
end of the backward pass is exposed communication; the rest was hidden behind computing.

By ZeRO stage, as DeepSpeed 0.19 does it: 0 and 1 reduce buckets in the last backward pass of a step (0 without
overlap, which comes to the same as after it), 2 in each, and 1 and 2 gather the new weights after the update; 3 gathers
weights ahead of their use in the forward pass, and again in the backward pass those beyond `zero.live_elements`, and
reduces as stage 2 does.

Not modelled: kernels that slow down while the network's run beside them, ranks that wait for the slowest one, networks
shared with others, evaluations, and the copies of offloaded states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ldm_scale.planning.cluster import Cluster, Gpu
from ldm_scale.planning.communication import all_reduce_s, scatter_s
from ldm_scale.planning.efficiency import Software
from ldm_scale.planning.meta_step import Phase
from ldm_scale.planning.trace import Gradient, Operation, Trace

Precision = Literal["bf16", "fp32"]

# The gradients' norm reads 4 bytes a parameter; AdamW reads gradient, master and two moments and writes the last three.
_UPDATE_BYTES = 4 + 4 * 4 + 3 * 4
_AVERAGE_BYTES = 12  # reads master and average, writes the average


@dataclass(frozen=True)
class Rival:
    """Stage 1's discriminator. Its work is the trace's phase of that name."""

    parameters: int
    stage: int  # of ZeRO: 0 or 1


@dataclass(frozen=True)
class Job:
    """What a rank has to do in a step."""

    trace: Trace  # of what is trained
    precision: Precision
    parameters: int
    stage: int  # of ZeRO
    micro_batch: int
    accumulation_steps: int = 1
    frozen: tuple[tuple[str, Trace], ...] = ()  # networks that run before each micro-batch, by name
    averages: int = 0  # of the weights
    bucket_elements: int = 50_000_000
    live_elements: int = 1_000_000_000  # of stage 3
    overlaps: bool = True  # buckets travel while the backward pass goes on
    gradient_bytes: int = 0  # of a number that is reduced; 0: those of the precision
    loading_s: float = 0.0  # of an image, on one rank, decoding included
    read_bytes: float = 0.0  # of an image, from the storage that all ranks share
    rival: Rival | None = None

    @property
    def compute_bytes(self) -> int:
        """Of a number in the forward pass."""
        return 2 if self.precision == "bf16" else 4

    @property
    def images(self) -> int:
        """Of a rank in a step."""
        return self.micro_batch * self.accumulation_steps


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; the parts add up to the step."""

    forward: float
    backward: float
    frozen: dict[str, float]  # by network
    communication_exposed: float
    communication_hidden: float  # beside the others, no part of the sum
    optimizer: float
    averages: float
    input_exposed: float  # what the GPU waits for data
    losses: float = 0.0  # stage 1: from pixels to the gradient at the decoder's output
    discriminator: float = 0.0  # stage 1: its own forward and backward pass

    @property
    def computing(self) -> float:
        """What the GPU's operations take."""
        return self.forward + self.losses + self.backward + self.discriminator + sum(self.frozen.values())

    @property
    def total(self) -> float:
        """From one step to the next."""
        return self.computing + self.communication_exposed + self.optimizer + self.averages + self.input_exposed


def operation_s(operation: Operation, images: int, gpu: Gpu, software: Software, precision: Precision) -> float:
    """Seconds of one operation by the roofline, and what each operation takes."""
    if operation.kind == "attention":
        share, peak = software.attention_share, gpu.half_flops if precision == "bf16" else gpu.fp32_flops
    else:
        wide = gpu.tf32_flops if operation.kind == "convolution" else gpu.fp32_flops
        share, peak = software.matrix_share, gpu.half_flops if precision == "bf16" and not operation.wide else wide
    arithmetic = operation.flops.of(images) / (share * peak)
    memory = operation.bytes.of(images) / (software.memory_share * gpu.memory_rate)
    return software.operation_s + max(arithmetic, memory)


def compute_s(
    trace: Trace, images: int, gpu: Gpu, software: Software, precision: Precision, phase: Phase | None = None
) -> float:
    """Seconds of a trace's operations, or of those of a phase."""
    return sum(
        operation_s(operation, images, gpu, software, precision)
        for operation in trace.operations
        if phase in (None, operation.phase)
    )


def simulate(job: Job, cluster: Cluster, software: Software) -> StepTime:
    """The step, played through."""
    gpu, micros = cluster.gpu, job.accumulation_steps
    frozen = {name: compute_s(trace, job.micro_batch, gpu, software, job.precision) for name, trace in job.frozen}
    phases: tuple[Phase, ...] = ("forward", "losses", "discriminator")
    forward, losses, rival = (
        compute_s(job.trace, job.micro_batch, gpu, software, job.precision, phase) for phase in phases
    )
    segments = backward_segments(job, gpu, software)
    network, now = _Network(), 0.0
    # Stage 1 weighs its losses over all micro-batches before the first of them goes backward.
    passes = 2 * micros if job.rival is not None and micros > 1 else micros
    for _ in range(passes - micros):
        now = _forward(job, cluster, network, now, forward, segments) + losses
    for micro in range(micros):
        now = _forward(job, cluster, network, now + sum(frozen.values()), forward, segments) + losses
        reduces = job.stage >= 2 or micro == micros - 1
        now = _backward(job, cluster, network, now, segments, reduces) + rival
    now = max(now, network.free)
    if job.stage in (1, 2):
        now = network.carry(now, scatter_s(job.compute_bytes * job.parameters, cluster))
    if job.rival is not None:
        now = _rival(job, job.rival, cluster, network, now)
    backward = sum(segment.seconds for segment in segments)
    exposed = max(now - passes * (forward + losses) - micros * (backward + rival + sum(frozen.values())), 0.0)
    owned = job.parameters if job.stage == 0 else job.parameters / cluster.num_gpus
    rate = software.memory_share * gpu.memory_rate
    updated = owned
    if job.rival is not None:
        updated += job.rival.parameters / (1 if job.rival.stage == 0 else cluster.num_gpus)
    optimizer = updated * (_UPDATE_BYTES + job.compute_bytes) / rate + software.operation_s
    averages = owned * _AVERAGE_BYTES * job.averages / rate
    loading = job.images * max(job.loading_s, job.read_bytes * cluster.num_gpus / cluster.storage)
    return StepTime(
        forward=passes * forward,
        backward=micros * backward,
        frozen={name: micros * seconds for name, seconds in frozen.items()},
        communication_exposed=exposed,
        communication_hidden=max(network.busy - exposed, 0.0),
        optimizer=optimizer,
        averages=averages,
        input_exposed=max(loading - (now + optimizer + averages), 0.0),
        losses=passes * losses,
        discriminator=micros * rival,
    )


@dataclass(frozen=True)
class Segment:
    """A stretch of the backward pass that ends with one whole gradient, or with the pass."""

    seconds: float
    elements: int


def backward_segments(job: Job, gpu: Gpu, software: Software) -> list[Segment]:
    """The backward pass between gradients."""
    segments, seconds = [], 0.0
    for event in job.trace.events:
        if isinstance(event, Gradient):
            segments.append(Segment(seconds, event.elements))
            seconds = 0.0
        elif event.phase == "backward":
            seconds += operation_s(event, job.micro_batch, gpu, software, job.precision)
    return [*segments, Segment(seconds, 0)]


class _Network:
    """Carries messages one after another. Units: seconds."""

    def __init__(self) -> None:
        self.free = 0.0  # when the last message will have arrived
        self.busy = 0.0  # with all messages together

    def carry(self, ready: float, seconds: float) -> float:
        """When a message that is ready then, and takes so long, will have arrived."""
        self.free = max(self.free, ready) + seconds
        self.busy += seconds
        return self.free


def _forward(
    job: Job, cluster: Cluster, network: _Network, now: float, forward: float, segments: list[Segment]
) -> float:
    """When the forward pass ends. Stage 3 gathers weights on the way, as far ahead as the network gets.

    Which weights an operation needs is known for the backward pass alone: the forward pass is taken to be its mirror
    image, stretch by stretch.
    """
    if job.stage < 3:
        return now + forward
    stretch = forward / sum(segment.seconds for segment in segments)
    for seconds, elements in _buckets(job, list(reversed(segments)), before=True):
        arrived = network.carry(0.0, scatter_s(job.compute_bytes * elements, cluster))
        now = max(now, arrived) + stretch * seconds
    return now


def _backward(
    job: Job, cluster: Cluster, network: _Network, now: float, segments: list[Segment], reduces: bool
) -> float:
    """When the last operation of the backward pass ends; buckets may still be under way.

    Stage 3 gathers again what it has let go, a bucket ahead of its use.
    """
    gradient_bytes = job.gradient_bytes or job.compute_bytes
    gathers = job.stage == 3 and job.parameters > job.live_elements
    again = 1 - job.live_elements / job.parameters if gathers else 0.0
    buckets = _buckets(job, segments)
    arrivals: list[float] = []
    for index, (seconds, elements) in enumerate(buckets):
        if gathers:
            for _, ahead in buckets[len(arrivals) : index + 2]:
                arrivals.append(network.carry(now, scatter_s(again * job.compute_bytes * ahead, cluster)))
            now = max(now, arrivals[index])
        now += seconds
        if reduces and elements:
            reduction = all_reduce_s if job.stage == 0 else scatter_s
            arrived = network.carry(now, reduction(gradient_bytes * elements, cluster))
            now = now if job.overlaps else max(now, arrived)
    return now


def _rival(job: Job, rival: Rival, cluster: Cluster, network: _Network, now: float) -> float:
    """When the discriminator's gradients are reduced and its new weights everywhere; nothing hides that."""
    reduction = all_reduce_s if rival.stage == 0 else scatter_s
    now = network.carry(now, reduction((job.gradient_bytes or job.compute_bytes) * rival.parameters, cluster))
    if rival.stage == 1:
        now = network.carry(now, scatter_s(job.compute_bytes * rival.parameters, cluster))
    return now


def _buckets(job: Job, segments: list[Segment], before: bool = False) -> list[tuple[float, int]]:
    """Seconds and elements of stretches that end when a bucket is full; a bucket never divides a gradient.

    `before`: its elements are needed before the stretch, so that it is the stretch of these very elements.
    """
    buckets: list[tuple[float, int]] = []
    seconds, elements = 0.0, 0
    for segment in segments:
        if elements and elements + segment.elements > job.bucket_elements:
            # The bucket leaves when the next gradient does not fit, which is when that one is whole.
            buckets.append((seconds if before else seconds + segment.seconds, elements))
            seconds, elements = (segment.seconds if before else 0.0), segment.elements
        else:
            seconds, elements = seconds + segment.seconds, elements + segment.elements
    return [*buckets, (seconds, elements)]
