"""Whether Triton compiles here, and computes right: one kernel of ours against plain torch."""

from __future__ import annotations

import torch

from ldm_kernels import group_norm_silu
from ldm_scale.operations.doctor_report import Report

_TOLERANCE = 1e-4  # of the reference's largest value, in fp32


def check_kernel(report: Report, device: torch.device, backend: str = "triton") -> None:
    """Compiles a kernel of ours and compares its result and gradient with the reference."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 64, 16, 16, generator=generator).to(device) for _ in range(2))
    weight, bias = (torch.randn(64, generator=generator).to(device) for _ in range(2))
    results: list[list[torch.Tensor]] = []
    for choice in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        try:
            y = group_norm_silu(leaf, 32, weight, bias, backend=choice)
            (gradient,) = torch.autograd.grad(y, leaf, dy)
        except Exception as error:  # whatever a compiler of the user's installation raises
            reason = (str(error).splitlines() or [""])[0]
            report.facts["triton"] = "fails"
            report.error(
                f"group_norm_silu cannot be compiled or run ({type(error).__name__}: {reason})",
                "Triton",
                "install a C compiler and Python's headers, or train with kernels.*=reference",
            )
            return
        results.append([y.detach(), gradient])
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    report.facts |= {"triton": "works", "triton_relative_error": difference}
    if difference < _TOLERANCE:
        report.ok(f"group_norm_silu compiles and agrees with the reference to {difference:.1e}", "Triton")
    else:
        report.error(
            f"group_norm_silu differs from the reference by {difference:.1e} of its largest value",
            "Triton",
            "train with kernels.*=reference and run `make gpu-proof`",
        )
