"""What GPUs can do at best: the denominator of MFU."""

from __future__ import annotations

import torch

# Dense bf16 products with fp32 sums, FLOP/s, from the makers' data sheets (which print sparse figures, twice as large,
# beside them). The first entry whose words are all in the device's name counts.
_PEAK_BF16 = {
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H100",): 989.4e12,
    ("H200",): 989.4e12,
    ("GH200",): 989.4e12,
    ("B200",): 2250e12,
    ("A100",): 312e12,
    ("A30",): 165e12,
    ("A10",): 125e12,
    ("L40S",): 362e12,
    ("L4",): 121e12,
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a whole GPU of that name, as CUDA calls it; None where no one figure stands for it.

    That is: of devices that are not in the table, CPUs among them; of a slice of a GPU (MIG); and in fp32, where
    convolutions take TF32 units and matrix products do not.
    """
    words = device_name.replace("-", " ").split()
    if dtype != torch.bfloat16 or "MIG" in words:
        return None
    return next((peak for names, peak in _PEAK_BF16.items() if all(name in words for name in names)), None)
