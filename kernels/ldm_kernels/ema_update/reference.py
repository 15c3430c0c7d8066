"""Exponential moving averages of many tensors at once, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


def ema_update(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]], weights: Sequence[Tensor], decay: float | Sequence[float]
) -> None:
    """average <- decay * average + (1 - decay) * weight, in place, for each pair; once for each of several decays.

    Computed as `torch.lerp` does: a share of the difference is added to the nearer end, so that decays 0 and 1 are
    exact. Weights of a half type are brought to fp32 first.

    Shapes: pairs of equal shape; averages in fp32; with several decays, one list of averages for each.
    """
    update(*as_lists(averages, decay), weights=weights)


def as_lists(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]], decay: float | Sequence[float]
) -> tuple[list[Sequence[Tensor]], list[float]]:
    """(one list of averages per decay, the decays), of either form of the arguments."""
    if isinstance(decay, Sequence):
        return list(averages), list(decay)  # type: ignore[arg-type]  # several decays come with lists of lists
    return [averages], [decay]  # type: ignore[list-item]  # and one with one list


@torch.no_grad()
def update(averages: Sequence[Sequence[Tensor]], decays: Sequence[float], weights: Sequence[Tensor]) -> None:
    """`ema_update` for a list of decays."""
    if not weights:
        return
    single = [weight.float() for weight in weights]
    for of_decay, decay in zip(averages, decays, strict=True):
        torch._foreach_lerp_(list(of_decay), single, 1.0 - decay)
        increment_version(list(of_decay))  # torch 2.11 does not, on CUDA
