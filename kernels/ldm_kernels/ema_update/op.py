"""Moving averages of the weights: checks, choice of implementation, and the kernel as an operator that torch knows.

Default without a measured winner: with one decay torch's own fused `lerp`, which moves the fewest bytes already (12 a
parameter); with several, the kernel, which reads the weights once for all of them (20 bytes instead of 24 for two).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from ldm_kernels.common import launch, tuning
from ldm_kernels.ema_update import reference


def ema_update(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
    decay: float | Sequence[float],
    backend: str = "auto",
) -> None:
    """average <- decay * average + (1 - decay) * weight, in place, for each pair; once for each of several decays.

    With one number as decay, `averages` is one list; with a sequence of them, a list of lists, one for each. Nothing is
    written unless all is in order. No gradient flows. `backend` is auto, triton or reference; triton keeps the
    addresses of the tensors on the device, so the first call with a set of tensors copies a table there.

    Shapes: pairs of equal shape; averages in fp32, weights in fp32, fp16 or bf16, all on one device.
    Raises: ValueError if counts, shapes, devices or a decay are wrong, the backend is unknown, or "triton" is given
    tensors whose elements do not lie in the same order in one piece; TypeError if a type is wrong, or "triton" cannot
    serve the device.
    """
    lists, decays = reference.as_lists(averages, decay)
    _check(lists, weights, decays)
    if not weights or not decays:
        return
    chosen = tuning.choose("ema_update", backend, ("triton", "reference"), weights[0], {"decays": len(decays)})
    if chosen is None:
        chosen = "triton" if len(decays) > 1 and tuning.serves(weights[0]) else "reference"
    if chosen == "triton":
        scattered = _scattered(lists, weights)
        if scattered is None:
            with torch.no_grad():
                _ema_update([average for of_decay in lists for average in of_decay], list(weights), decays)
            return
        if backend == "triton":
            raise ValueError(
                f"ema_update: {scattered}; backend 'triton' needs averages and weights that are contiguous, or both "
                "channels_last; copy them, or take backend 'auto'"
            )
    launch.note_outcome("ema_update", "reference")
    reference.update(lists, decays, weights)


def _check(averages: Sequence[Sequence[Tensor]], weights: Sequence[Tensor], decays: Sequence[float]) -> None:
    if len(averages) != len(decays):
        raise ValueError(
            f"ema_update: {len(averages)} lists of averages for {len(decays)} decays; give one list for each decay"
        )
    for decay in decays:
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_update: decay {decay} is not between 0 and 1")
    for of_decay, decay in zip(averages, decays, strict=True):
        if len(of_decay) != len(weights):
            raise ValueError(
                f"ema_update: {len(of_decay)} averages (decay {decay}) for {len(weights)} weights; give them in pairs"
            )
        for i, (average, weight) in enumerate(zip(of_decay, weights, strict=True)):
            if average.shape != weight.shape:
                raise ValueError(
                    f"ema_update: pair {i} (decay {decay}) is of shapes {tuple(average.shape)} and "
                    f"{tuple(weight.shape)}; average and weight must be of the same shape"
                )
            if average.dtype != torch.float32 or weight.dtype not in tuning.KERNEL_DTYPES:
                raise TypeError(
                    f"ema_update: pair {i} (decay {decay}) is of types {average.dtype} and {weight.dtype}; averages "
                    "are float32, since a half type would round small steps away, and weights float32, float16 or "
                    "bfloat16"
                )
            if average.device != weights[0].device or weight.device != weights[0].device:
                raise ValueError(
                    f"ema_update: pair {i} (decay {decay}) is on {average.device} and {weight.device}, and the first "
                    f"weight on {weights[0].device}; call once for each device"
                )


def _scattered(averages: Sequence[Sequence[Tensor]], weights: Sequence[Tensor]) -> str | None:
    """Which pair does not lie in memory as two equally ordered runs, in words; None if every one does."""
    for i, weight in enumerate(weights):
        for layout in (torch.contiguous_format, torch.channels_last):
            pair = [weight, *(of_decay[i] for of_decay in averages)]
            if all(x.is_contiguous(memory_format=layout) for x in pair):
                break
        else:
            strides = ", ".join(str(x.stride()) for x in pair)
            return f"pair {i} of shape {tuple(weight.shape)} has strides {strides} (the weight's first)"
    return None


@custom_op("ldm_kernels::ema_update_", mutates_args=("averages",))
def _ema_update(averages: Sequence[Tensor], weights: Sequence[Tensor], decays: Sequence[float]) -> None:
    """`averages` holds the lists of all decays, one after the other."""
    from ldm_kernels.ema_update import kernel

    launch.note_outcome("ema_update", "triton")
    count = len(weights)
    kernel.ema_update_([averages[i * count : (i + 1) * count] for i in range(len(decays))], weights, decays)


@_ema_update.register_fake
def _ema_update_fake(averages: Sequence[Tensor], weights: Sequence[Tensor], decays: Sequence[float]) -> None:
    return None
