"""Seconds of the collectives that ZeRO calls, by message, ranks and topology.

A ring sends, in each of its n - 1 steps, 1/n of the message to a neighbour, and its slowest link sets the pace: the
network's where there are several nodes, and every GPU's adapter carries a ring of its own. A hierarchical collective
works inside the nodes first and sends between them, on every adapter, what one GPU of a node holds. A tree has fewer
steps. The fastest of them counts, which is what NCCL's own model chooses between.

Sources: latencies are the ring's, protocol "simple", of NCCL's tuning model (src/graph/tuning.cc since version 2.18: a
call 8.4 us, a step 3.4 us over NVLink, 5.7 over PCIe, 14 over the network). Shares of a link that are reached are
assumptions of this planner: 0.8 over NVLink and PCIe, 0.9 over the network.
"""

from __future__ import annotations

import math

from ldm_scale.planning.cluster import Cluster

CALL_S = 8.4e-6
NVLINK_STEP_S, PCIE_STEP_S, NETWORK_STEP_S = 3.4e-6, 5.7e-6, 14e-6
INTRA_SHARE, INTER_SHARE = 0.8, 0.9


def scatter_s(num_bytes: float, cluster: Cluster) -> float:
    """Seconds of a reduce-scatter, or of an all-gather, whose whole message has so many bytes."""
    return _one_way(num_bytes, cluster) + CALL_S if cluster.num_gpus > 1 else 0.0


def all_reduce_s(num_bytes: float, cluster: Cluster) -> float:
    """Seconds of an all-reduce of so many bytes."""
    if cluster.num_gpus == 1:
        return 0.0
    return min(2 * _one_way(num_bytes, cluster), _tree(num_bytes, cluster)) + CALL_S


def _one_way(num_bytes: float, cluster: Cluster) -> float:
    return min(_ring(num_bytes, cluster), _hierarchical(num_bytes, cluster))


def _step_s(cluster: Cluster) -> float:
    return NVLINK_STEP_S if cluster.gpu.nvlink else PCIE_STEP_S


def _inside(num_bytes: float, cluster: Cluster) -> float:
    """A ring inside each node."""
    ranks = cluster.gpus_per_node
    return (ranks - 1) * _step_s(cluster) + (ranks - 1) / ranks * num_bytes / (INTRA_SHARE * cluster.intra)


def _ring(num_bytes: float, cluster: Cluster) -> float:
    """One ring per adapter through all GPUs; the rings share the message."""
    if cluster.num_nodes == 1:
        return _inside(num_bytes, cluster)
    ranks = cluster.num_gpus
    rate = min(INTRA_SHARE * cluster.intra, INTER_SHARE * cluster.inter * cluster.gpus_per_node)
    crossings = cluster.num_nodes - 1
    latency = crossings * NETWORK_STEP_S + (ranks - 1 - crossings) * _step_s(cluster)
    return latency + (ranks - 1) / ranks * num_bytes / rate


def _hierarchical(num_bytes: float, cluster: Cluster) -> float:
    """Inside the nodes, and then between the GPUs of the same place in every node."""
    nodes = cluster.num_nodes
    share = num_bytes / cluster.gpus_per_node
    between = (nodes - 1) * NETWORK_STEP_S + (nodes - 1) / nodes * share / (INTER_SHARE * cluster.inter)
    return _inside(num_bytes, cluster) + between


def _tree(num_bytes: float, cluster: Cluster) -> float:
    """Up and down a double binary tree of the nodes, with a chain inside each (arXiv:0910.2235; NCCL 2.4)."""
    if cluster.num_nodes == 1:
        return math.inf
    steps = math.ceil(math.log2(cluster.num_nodes)) * NETWORK_STEP_S + (cluster.gpus_per_node - 1) * _step_s(cluster)
    rate = min(INTRA_SHARE * cluster.intra, INTER_SHARE * cluster.inter * cluster.gpus_per_node)
    return 2 * (steps + num_bytes / rate)
