"""Memory that this process has taken at most."""

from __future__ import annotations

import resource

import torch


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB so far, for the log of scalars: of the host, and on CUDA of the device's allocator."""
    # Linux counts the resident set in KiB.
    figures = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        figures["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        figures["memory/device_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return figures
