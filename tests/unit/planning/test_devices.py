"""Peaks belong to whole GPUs by their names, and to the type that their tensor cores are quoted for."""

from __future__ import annotations

import pytest
import torch

from ldm_scale.planning.devices import peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_peaks_go_by_the_name(name: str, peak: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == peak


def test_fp32_has_no_one_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
