"""The simulated step: rooflines, overlap bucket by bucket against timelines made by hand, limits, ZeRO's stages."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ldm_scale.planning import communication, step_time
from ldm_scale.planning.cluster import GB, GPUS, Cluster
from ldm_scale.planning.efficiency import Software
from ldm_scale.planning.step_time import Job, Rival, operation_s, simulate
from ldm_scale.planning.trace import Amount, Gradient, Operation, Trace

SOFTWARE = Software(0.5, 0.0, "a test", attention_share=0.25, memory_share=1.0)
H100 = GPUS["h100"]
MS = 0.5 * H100.half_flops * 1e-3  # FLOPs of a millisecond
ELEMENTS = 40_000_000


def _work(phase: step_time.Phase, milliseconds: float) -> Operation:
    return Operation("product", phase, Amount(0, milliseconds * MS), Amount(0, 0))


def _trace(gradients: int = 3) -> Trace:
    """Forward 10 ms; backward 10 ms before each of some gradients."""
    events: list[Operation | Gradient] = [_work("forward", 10)]
    for _ in range(gradients):
        events += [_work("backward", 10), Gradient(ELEMENTS)]
    return Trace(tuple(events))


def _job(**changes: object) -> Job:
    job = Job(_trace(), "bf16", 3 * ELEMENTS, stage=0, micro_batch=1, bucket_elements=ELEMENTS)
    return dataclasses.replace(job, **changes)  # type: ignore[arg-type]


@pytest.fixture
def no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CALL_S", "NVLINK_STEP_S", "PCIE_STEP_S", "NETWORK_STEP_S"):
        monkeypatch.setattr(communication, name, 0.0)


def _cluster(bucket_ms: float, nodes: int = 1, per_node: int = 2) -> Cluster:
    """Two GPUs on which an all-reduce of a bucket takes so long."""
    return Cluster(H100, per_node, nodes, 2 * ELEMENTS / (0.8 * bucket_ms * 1e-3))


def test_rooflines() -> None:
    software = dataclasses.replace(SOFTWARE, operation_s=1e-6)
    memory = Operation("other", "forward", Amount(0, 0), Amount(3.35e9, 3.35e9))
    assert operation_s(memory, 3, H100, software, "bf16") == pytest.approx(4e-3 + 1e-6)
    product = Operation("product", "forward", Amount(0, MS), Amount(0, 0))
    assert operation_s(product, 2, H100, software, "bf16") == pytest.approx(2e-3 + 1e-6)
    attention = dataclasses.replace(product, kind="attention")
    assert operation_s(attention, 2, H100, software, "bf16") == pytest.approx(4e-3 + 1e-6)
    # fp32: convolutions have TF32, products have not.
    convolution = dataclasses.replace(product, kind="convolution")
    assert operation_s(convolution, 1, H100, SOFTWARE, "fp32") == pytest.approx(2e-3)
    assert operation_s(product, 1, H100, SOFTWARE, "fp32") == pytest.approx(989.4 / 67 * 1e-3)


def test_one_gpu_computes_alone() -> None:
    for stage in range(4):
        step = simulate(_job(stage=stage), Cluster(H100, 1, 1), SOFTWARE)
        assert (step.communication_exposed, step.communication_hidden) == (0, 0)
        assert (step.forward, step.backward) == pytest.approx((10e-3, 30e-3))
        assert step.total == pytest.approx(40e-3 + step.optimizer)


@pytest.mark.usefixtures("no_latency")
def test_infinite_links_leave_computing() -> None:
    for stage in range(4):
        step = simulate(_job(stage=stage), Cluster(H100, 8, 4, math.inf, math.inf), SOFTWARE)
        assert step.communication_exposed == pytest.approx(0, abs=1e-12)
        assert step.communication_hidden == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("no_latency")
@pytest.mark.parametrize("bucket_ms", [4, 9, 15])
def test_buckets_travel_during_the_backward_pass(bucket_ms: float) -> None:
    # A bucket leaves when the next gradient does not fit: after 20 and 30 ms of the pass, and the last at its end.
    free = 0.0
    for ready in (20.0, 30.0, 30.0):
        free = max(free, ready) + bucket_ms
    step = simulate(_job(), _cluster(bucket_ms), SOFTWARE)
    assert step.communication_exposed == pytest.approx((free - 30) * 1e-3)
    assert step.communication_hidden == pytest.approx((3 * bucket_ms - (free - 30)) * 1e-3)


@pytest.mark.usefixtures("no_latency")
def test_stage_3_gathers_a_bucket_ahead() -> None:
    """With messages of 4 ms: the three stretches of the forward pass, 3.3 ms each, end at 15.3 instead of 10.

    Of the backward pass (20, 10 and 0 ms before the buckets' ends) the first gather is waited for, the second and third
    hide behind the stretches before them, and of three reductions, the first of which hides, two come after its end.
    """
    step = simulate(_job(stage=3, live_elements=1), _cluster(8), SOFTWARE)
    assert step.communication_exposed == pytest.approx((4 + 4 / 3 + 4 + 4 + 4) * 1e-3, rel=1e-6)


@pytest.mark.usefixtures("no_latency")
def test_without_overlap_all_of_it_is_exposed() -> None:
    step = simulate(_job(overlaps=False), _cluster(4), SOFTWARE)
    assert step.communication_exposed == pytest.approx(12e-3)
    assert step.communication_hidden == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("no_latency")
def test_the_stages_move_what_zero_moves() -> None:
    """arXiv:1910.02054, section 7: stages 0 to 2 move twice the parameters, 3 three times if weights are let go."""
    for accumulation, expected in ((1, {0: 2, 1: 2, 2: 2, 3: 2}), (4, {0: 2, 1: 2, 2: 5, 3: 8})):
        for stage, times in expected.items():
            job = _job(stage=stage, accumulation_steps=accumulation, overlaps=False)
            step = simulate(job, _cluster(4), SOFTWARE)
            once = 3 * 4e-3 / 2  # reduce-scatter or all-gather of all parameters
            moved = step.communication_exposed + step.communication_hidden
            assert moved == pytest.approx(times * once), (stage, accumulation)
    released = simulate(_job(stage=3, live_elements=1), _cluster(4), SOFTWARE)
    assert released.communication_exposed + released.communication_hidden == pytest.approx(3 * 3 * 4e-3 / 2, rel=1e-6)


def test_the_optimizer_and_averages_are_memory() -> None:
    owned = 3 * ELEMENTS / 2
    step = simulate(_job(stage=1, averages=2), _cluster(4), SOFTWARE)
    assert step.optimizer == pytest.approx(owned * 34 / 3.35e12)
    assert step.averages == pytest.approx(2 * owned * 12 / 3.35e12)
    whole = simulate(_job(stage=0, averages=2), _cluster(4), SOFTWARE)
    assert whole.optimizer == pytest.approx(2 * step.optimizer)


def test_input_is_waited_for_once_it_is_slower_than_the_step() -> None:
    fast = simulate(_job(loading_s=1e-3), Cluster(H100, 1, 1), SOFTWARE)
    assert fast.input_exposed == 0
    slow = simulate(_job(loading_s=0.1), Cluster(H100, 1, 1), SOFTWARE)
    assert slow.total == pytest.approx(0.1)
    # 2 GPUs that read 1 GB an image from 10 GB/s.
    storage = Cluster(H100, 2, 1, storage_rate=10 * GB)
    assert simulate(_job(read_bytes=1 * GB), storage, SOFTWARE).total == pytest.approx(0.2)


def test_frozen_networks_run_before_each_micro_batch() -> None:
    job = _job(accumulation_steps=3, frozen=(("first stage", Trace((_work("forward", 5),))),))
    step = simulate(job, Cluster(H100, 1, 1), SOFTWARE)
    assert step.frozen == {"first stage": pytest.approx(15e-3)}
    assert step.computing == pytest.approx(135e-3)


def test_slower_links_and_more_nodes_are_never_faster() -> None:
    for stage in range(4):
        slower = [simulate(_job(stage=stage), _cluster(ms), SOFTWARE).total for ms in (1, 2, 5, 20, 100)]
        assert slower == sorted(slower)
        nodes = [simulate(_job(stage=stage), _cluster(5, n, 8), SOFTWARE) for n in (1, 2, 8, 64)]
        times = [step.total - step.optimizer for step in nodes]
        assert times == sorted(times)


def test_parts_add_up() -> None:
    job = _job(stage=2, accumulation_steps=2, averages=1, loading_s=0.2)
    step = simulate(job, _cluster(20), SOFTWARE)
    parts = dataclasses.asdict(step)
    frozen = parts.pop("frozen")
    parts.pop("communication_hidden")
    assert step.total == pytest.approx(sum(parts.values()) + sum(frozen.values()))
    assert step.total == pytest.approx(0.4)  # two images


def test_a_discriminators_gradients_follow_the_autoencoders(no_latency: None) -> None:
    events = (_work("forward", 10), _work("losses", 4), _work("backward", 10), Gradient(ELEMENTS))
    trace = Trace((*events, _work("discriminator", 6)))
    job = _job(trace=trace, parameters=ELEMENTS, rival=Rival(ELEMENTS, 0))
    step = simulate(job, _cluster(bucket_ms=8), SOFTWARE)
    assert (step.losses, step.discriminator) == pytest.approx((4e-3, 6e-3))
    # 8 ms of the autoencoder's bucket, 6 of them beside the discriminator's own pass, and then 8 of its gradients.
    assert (step.communication_exposed, step.communication_hidden) == pytest.approx((10e-3, 6e-3))
    sharded = simulate(dataclasses.replace(job, rival=Rival(ELEMENTS, 1)), _cluster(bucket_ms=8), SOFTWARE)
    assert sharded.communication_exposed == pytest.approx(10e-3), "scattered, and gathered: as long as both at once"
    assert sharded.optimizer < step.optimizer
    # Two micro-batches: a forward pass more for each, by which the losses are weighed.
    twice = simulate(dataclasses.replace(job, accumulation_steps=2), Cluster(H100, 1, 1), SOFTWARE)
    assert (twice.forward, twice.losses, twice.backward) == pytest.approx((40e-3, 16e-3, 20e-3))
    alone = simulate(dataclasses.replace(job, accumulation_steps=2, rival=None), Cluster(H100, 1, 1), SOFTWARE)
    assert alone.forward == pytest.approx(20e-3)


def test_what_is_computed_in_fp32_has_its_peak() -> None:
    product = dataclasses.replace(_work("losses", 1), wide=True)
    assert operation_s(product, 1, H100, SOFTWARE, "bf16") == pytest.approx(989.4 / 67 * 1e-3)
