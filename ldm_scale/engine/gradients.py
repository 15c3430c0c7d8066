"""The gradient that DeepSpeed holds before its step: where it lies, how large it is, and how it is forgotten.

Whether it is finite must be known before any optimizer moves. DeepSpeed finds out inside its step, class by class, at
stage 0 not at all; and of two engines the first would have stepped when the second refuses.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ldm_scale import faults
from ldm_scale.config.schema import ZeroConfig


def gradient_norm(engine: Any, stage: int) -> Tensor:
    """Norm of this rank's part of the accumulated gradient (at stage 0: of all of it), a scalar, before clipping."""
    gradients = _gradients(engine, stage)
    for gradient in gradients[:1]:
        faults.poison("step.gradients", gradient)
    return torch.nn.utils.get_total_norm(gradients)


def forget_gradient(engine: Any, adam: torch.optim.Optimizer) -> None:
    """Nothing; the accumulated gradient is gone, and what Adam holds has not moved. Collective: all ranks.

    A step of DeepSpeed with an optimizer that does nothing: each of its classes then clears what it keeps (buckets,
    partitions, counts of micro-batches), whether or not the gradient is finite.
    """
    with mock.patch.object(adam, "step", return_value=None):
        engine.step()


def memory_settings(zero: ZeroConfig, stage: int, on_cuda: bool) -> dict[str, Any]:
    """DeepSpeed's keys for what lies in the CPU's memory, and for what stage 3 keeps gathered."""
    on_cpu = {"device": "cpu", "pin_memory": on_cuda}
    settings: dict[str, Any] = {
        "stage3_max_live_parameters": zero.live_elements,
        "stage3_max_reuse_distance": zero.live_elements,
    }
    if zero.offload_optimizer and stage > 0:
        settings["offload_optimizer"] = on_cpu
    if zero.offload_parameters and stage == 3:
        settings["offload_param"] = on_cpu
    return settings


def _gradients(engine: Any, stage: int) -> list[Tensor]:
    """This rank's part of the accumulated gradient, averaged over the ranks."""
    if stage == 0:
        return [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    optimizer = engine.optimizer
    if engine.zero_offload_optimizer() is not None:
        owners = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        return [owner.grad for owner in owners if owner.grad is not None]
    if hasattr(optimizer, "averaged_gradients"):
        return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
    return list(optimizer.fp32_groups_gradient_flat_partition)  # DeepSpeed's own class for bf16 at stage 1
