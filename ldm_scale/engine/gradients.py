"""The gradient that DeepSpeed holds before its step: where it lies, how large it is, and how it is forgotten.

Whether it is finite must be known before any optimizer moves. DeepSpeed finds out inside its step, class by class, at
stage 0 not at all; and of two engines the first would have stepped when the second refuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ldm_scale import faults


class GradientNorm(NamedTuple):
    """The norm of an accumulated gradient before clipping, on the device: of all of it, or of this rank's part.

    Where DeepSpeed took it, `answer` is what its step would find again.
    """

    value: Tensor
    is_of_all: bool
    answer: Any = None


def gradient_norm(engine: Any, stage: int) -> GradientNorm:
    """The norm. Collective: all ranks, from stage 1 on."""
    gradients = _gradients(engine, stage)
    for gradient in gradients[:1]:
        faults.poison("step.gradients", gradient)
    method = _norm_method(engine, stage)
    if _checks_each(engine):
        # In fp32, as DeepSpeed takes it, which clips by it; torch's own function answers in the gradients' bf16.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        return GradientNorm(torch.linalg.vector_norm(torch.stack(norms)), is_of_all=True)
    if method is None:
        return GradientNorm(torch.nn.utils.get_total_norm(gradients), is_of_all=stage == 0)
    from deepspeed.runtime.utils import combine_grad_norm_groups

    with torch.no_grad():
        answer = getattr(engine.optimizer, method)()
        value = answer if isinstance(answer, Tensor) else combine_grad_norm_groups(answer)
    return GradientNorm(value, is_of_all=True, answer=answer)


def handed_back(engine: Any, stage: int, norm: GradientNorm | None) -> AbstractContextManager[Any]:
    """A context in which DeepSpeed's step takes its own answer about the norm instead of reading the gradient again."""
    if norm is not None and _checks_each(engine):
        return _whole_norm_handed_back(engine.optimizer, float(norm.value))
    method = _norm_method(engine, stage)
    if norm is None or method is None:
        return nullcontext()
    return mock.patch.object(engine.optimizer, method, return_value=norm.answer)


def forget_gradient(engine: Any, adam: torch.optim.Optimizer) -> None:
    """Nothing; the accumulated gradient is gone, and what Adam holds has not moved. Collective: all ranks.

    A step of DeepSpeed with an optimizer that does nothing: each of its classes then clears what it keeps (buckets,
    partitions, counts of micro-batches), whether or not the gradient is finite.
    """
    with mock.patch.object(adam, "step", return_value=None):
        engine.step()


def _checks_each(engine: Any) -> bool:
    """Whether it is DeepSpeed's optimizer of stage 0 in bf16, which asks the device about each parameter's gradient."""
    return hasattr(engine.optimizer, "overflow_checker") and hasattr(engine.optimizer, "fp16_groups")


@contextmanager
def _whole_norm_handed_back(optimizer: Any, norm: float) -> Iterator[None]:
    """A norm of all parameters in place of that optimizer's search for what is not finite, and of its own norm.

    Both read every gradient by itself, and the search waits for the device after each.
    """
    from deepspeed.runtime.fp16 import unfused_optimizer

    assert len(optimizer.fp16_groups) == 1, "it takes one norm a group"
    with (
        mock.patch.object(optimizer.overflow_checker, "check", return_value=not math.isfinite(norm)),
        mock.patch.object(unfused_optimizer, "get_weight_norm", return_value=norm),
    ):
        yield


def _norm_method(engine: Any, stage: int) -> str | None:
    """The optimizer's method that takes the norm of the gradient which `_gradients` gives; None if it has none."""
    if stage == 0 or engine.zero_offload_optimizer() is not None or not hasattr(engine.optimizer, "averaged_gradients"):
        return None
    return "_get_norm_groups" if stage == 3 else "scaled_global_norm"


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
