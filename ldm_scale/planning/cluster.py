"""GPUs, and how they are joined: what `plan --gpu` counts with, each figure with its source.

Rates are those of data sheets; how much of them a training step reaches stands in `efficiency.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldm_scale.errors import ConfigError

GB, GIB = 1e9, 2**30
LARGEST_NODE = 72  # GPUs of one NVLink domain: NVIDIA's GB200 NVL72
STORAGE_PER_NODE = 2 * GB  # an assumption: one client of a parallel file system; measure your own


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, and the node that it usually comes in.

    Units: FLOP/s of dense products with fp32 sums; bytes; bytes/s one way and per GPU; watts of the GPU alone.
    """

    name: str
    half_flops: float  # bf16; of a V100 fp16, it has no bf16
    tf32_flops: float  # convolutions of fp32 numbers; of a V100 plain fp32
    fp32_flops: float  # matrix products of fp32 numbers, which torch leaves to the fp32 units
    memory: float
    memory_rate: float
    intra_rate: float  # to the other GPUs of its node
    inter_rate: float  # to other nodes
    watts: float
    has_bf16: bool = True
    nvlink: bool = True  # else PCIe inside the node


# Sources: NVIDIA's data sheets of the V100 (SXM2 32 GB), A100, H100 and H200 (SXM), HGX B200 and L40S: dense rates,
# where sheets print those with sparsity as well; NVLink's rate is half of what is printed, which counts both ways.
# Between nodes: NVIDIA's DGX-1 (4 x 100 Gbit/s for 8 GPUs), DGX A100 (8 x 200), DGX H100, H200 and B200 (8 x 400); of
# an L40S half of a 400 Gbit/s adapter, which is an assumption.
# Memory is what CUDA reports as a device's total: of an H100 79.18 GiB (benchmarks/results, the first gpu_proof), of
# a B200 178.35 (pytorch/ao, pull request 4002), of the others as torch says it when memory runs out ("a total capacity
# of ..."); of an L40S the data sheet's.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100", 125e12, 15.7e12, 15.7e12, 31.74 * GIB, 0.9e12, 150 * GB, 6.25 * GB, 300, has_bf16=False),
        Gpu("a100-40", 312e12, 156e12, 19.5e12, 39.39 * GIB, 1.555e12, 300 * GB, 25 * GB, 400),
        Gpu("a100-80", 312e12, 156e12, 19.5e12, 79.15 * GIB, 2.039e12, 300 * GB, 25 * GB, 400),
        Gpu("h100", 989.4e12, 494.7e12, 67e12, 79.18 * GIB, 3.35e12, 450 * GB, 50 * GB, 700),
        Gpu("h200", 989.4e12, 494.7e12, 67e12, 139.8 * GIB, 4.8e12, 450 * GB, 50 * GB, 700),
        Gpu("b200", 2250e12, 1125e12, 75e12, 178.35 * GIB, 8.0e12, 900 * GB, 50 * GB, 1000),
        Gpu("l40s", 362e12, 183e12, 91.6e12, 48 * GB, 0.864e12, 32 * GB, 25 * GB, 350, nvlink=False),
    )
}


@dataclass(frozen=True)
class Cluster:
    """So many equal nodes of one kind of GPU.

    Units: bytes/s; of the links one way and per GPU, of the storage for the whole cluster.
    """

    gpu: Gpu
    gpus_per_node: int = 8
    num_nodes: int = 1
    intra_rate: float = 0.0  # 0: the GPU's own
    inter_rate: float = 0.0
    storage_rate: float = 0.0  # 0: STORAGE_PER_NODE of each node

    def __post_init__(self) -> None:
        """Raises: ConfigError if there is no node, or no GPU in it."""
        for option, count in (("--gpus-per-node", self.gpus_per_node), ("--nodes", self.num_nodes)):
            if count < 1:
                raise ConfigError(f"{option} {count}: a cluster has at least 1; give a whole number from 1 on")
        if self.gpus_per_node > LARGEST_NODE:
            raise ConfigError(
                f"--gpus-per-node {self.gpus_per_node}: NVLink joins at most {LARGEST_NODE} GPUs; give more --nodes"
            )

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.gpus_per_node * self.num_nodes

    @property
    def intra(self) -> float:
        """Bytes/s from a GPU to others of its node."""
        return self.intra_rate or self.gpu.intra_rate

    @property
    def inter(self) -> float:
        """Bytes/s from a GPU to other nodes."""
        return self.inter_rate or self.gpu.inter_rate

    @property
    def storage(self) -> float:
        """Bytes/s that all nodes together read or write."""
        return self.storage_rate or STORAGE_PER_NODE * self.num_nodes


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises: ConfigError if it is not in the table.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name}: unknown; take one of {', '.join(GPUS)}")
    return gpu


def resized(cluster: Cluster, num_gpus: int) -> Cluster:
    """The cluster with so many GPUs: a part of one node, or whole nodes, the last of which may be counted full."""
    per_node = min(cluster.gpus_per_node, num_gpus)
    return Cluster(
        cluster.gpu,
        per_node,
        -(-num_gpus // per_node),
        cluster.intra_rate,
        cluster.inter_rate,
        cluster.storage_rate,
    )
