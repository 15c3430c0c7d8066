"""Collectives: closed forms of rings, what a larger or faster cluster does to them, and their limits."""

from __future__ import annotations

import math

import pytest

from ldm_scale.errors import ConfigError
from ldm_scale.planning import communication
from ldm_scale.planning.cluster import GB, GPUS, Cluster, find_gpu, resized
from ldm_scale.planning.communication import all_reduce_s, scatter_s

SIZE = 1000 * GB  # so large that latencies count for nothing


def _cluster(nodes: int, per_node: int = 8, intra: float = 100 * GB, inter: float = 10 * GB) -> Cluster:
    return Cluster(GPUS["h100"], per_node, nodes, intra, inter)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_ring_inside_a_node(ranks: int) -> None:
    cluster = _cluster(1, ranks)
    rate = 0.8 * 100 * GB
    assert scatter_s(SIZE, cluster) == pytest.approx((ranks - 1) / ranks * SIZE / rate, rel=1e-3)
    assert all_reduce_s(SIZE, cluster) == pytest.approx(2 * (ranks - 1) / ranks * SIZE / rate, rel=1e-3)


def test_between_nodes_every_adapter_carries_its_share() -> None:
    # 4 nodes of 8: a ring per adapter, 8 x 9 GB/s out of a node, against 80 GB/s inside.
    rings = 31 / 32 * SIZE / min(80 * GB, 8 * 9 * GB)
    hierarchy = 7 / 8 * SIZE / (80 * GB) + 3 / 4 * SIZE / 8 / (9 * GB)
    assert scatter_s(SIZE, _cluster(4)) == pytest.approx(min(rings, hierarchy), rel=1e-3)


def test_single_gpus_on_a_network_are_a_plain_ring() -> None:
    assert scatter_s(SIZE, _cluster(16, 1)) == pytest.approx(15 / 16 * SIZE / (9 * GB), rel=1e-3)


def test_small_messages_are_latency() -> None:
    inside = 8.4e-6 + 7 * 3.4e-6
    assert scatter_s(8, _cluster(1)) == pytest.approx(inside, rel=1e-3)
    # Hierarchical: 7 steps inside, 127 between; a single ring would have 1,023.
    assert scatter_s(8, _cluster(128)) == pytest.approx(inside + 127 * 14e-6, rel=1e-3)
    # A tree of 128 nodes has 7 levels.
    assert all_reduce_s(8, _cluster(128)) == pytest.approx(8.4e-6 + 2 * (7 * 14e-6 + 7 * 3.4e-6), rel=1e-3)


def test_one_gpu_has_no_communication() -> None:
    assert scatter_s(SIZE, _cluster(1, 1)) == all_reduce_s(SIZE, _cluster(1, 1)) == 0


def test_more_bytes_more_nodes_and_slower_links_take_longer() -> None:
    for collective in (scatter_s, all_reduce_s):
        assert collective(2 * SIZE, _cluster(4)) > collective(SIZE, _cluster(4))
        times = [collective(SIZE, _cluster(nodes)) for nodes in (1, 2, 4, 16, 64, 512)]
        assert times == sorted(times)
        assert collective(SIZE, _cluster(4, inter=5 * GB)) > collective(SIZE, _cluster(4))


def test_infinite_links_leave_latencies() -> None:
    cluster = _cluster(4, intra=math.inf, inter=math.inf)
    assert scatter_s(SIZE, cluster) == pytest.approx(
        communication.CALL_S + 7 * communication.NVLINK_STEP_S + 3 * communication.NETWORK_STEP_S
    )


def test_clusters_are_whole() -> None:
    with pytest.raises(ConfigError, match="--nodes 0: a cluster has at least 1"):
        Cluster(GPUS["h100"], 8, 0)
    with pytest.raises(ConfigError, match="--gpu h1000: unknown; take one of v100, a100-40"):
        find_gpu("h1000")
    assert find_gpu("H100").memory == 79.18 * 2**30
    assert [(part.num_gpus, part.num_nodes) for part in (resized(_cluster(4), n) for n in (1, 4, 8, 64))] == [
        (1, 1),
        (4, 1),
        (8, 1),
        (64, 8),
    ]


def test_data_sheets() -> None:
    """The same rates as the kernels' roofline and MFU, which have them from the same sheets."""
    from ldm_kernels.common.roofline import GPUS as ROOFLINE
    from ldm_scale.planning.devices import _PEAK_BF16

    for name, other in (("a100-80", "A100"), ("h100", "H100"), ("h200", "H200"), ("b200", "B200")):
        assert GPUS[name].half_flops == pytest.approx(ROOFLINE[other].bf16_flops_per_s, rel=1e-3)
        assert GPUS[name].memory_rate == ROOFLINE[other].memory_bytes_per_s
        assert GPUS[name].half_flops == _PEAK_BF16[(other,)]
    assert GPUS["l40s"].half_flops == _PEAK_BF16[("L40S",)]
