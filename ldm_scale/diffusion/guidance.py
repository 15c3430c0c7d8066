"""Classifier-free guidance: push the output away from what the model says without the condition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_scale.diffusion.process import Process
from ldm_scale.errors import ConfigError

# (z_t (B, c, h, w), t (B,)) -> the network's own output, float32.
Denoiser = Callable[[Tensor, Tensor], Tensor]
# The same -> (conditional, unconditional), from one pass over twice the batch, for example.
PairedDenoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def combine_guidance(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """unconditional + scale (conditional - unconditional), its deviation set back to that of conditional by `rescale`.

    In the notation of the first paper scale is 1 + w. Both are outputs of the network, in any parameterisation: all are
    linear. `rescale` is the second paper's phi, 0 for no change; it measures each image's deviation over its elements.
    A constant mixture has none to set back, and stays.
    Shapes: conditional and unconditional (B, ...), returns the same.
    Source: arXiv:2207.12598, eq. 6; arXiv:2305.08891, eq. 14 to 16.
    """
    guided_output = unconditional + scale * (conditional - unconditional)
    if rescale == 0.0:
        return guided_output
    dims = tuple(range(1, conditional.ndim))
    deviation = guided_output.std(dims, keepdim=True)
    factor = torch.where(deviation > 0, conditional.std(dims, keepdim=True) / deviation, 1.0)
    return guided_output * (rescale * factor + (1.0 - rescale))


def classifier_free_guidance(
    conditional: Denoiser,
    unconditional: Denoiser,
    process: Process,
    *,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    paired: PairedDenoiser | None = None,
) -> Denoiser:
    """The guided denoiser, for `sample`.

    Scale 1 is no guidance and asks `conditional` alone; 0 asks `unconditional` alone, at all noise levels; any other
    asks `paired`, or each of the two where there is none. With `interval` (low, high) images whose noise level
    sigma / alpha is not in (low, high] are not guided, and steps at which none is cost one pass; knowing this waits
    for the device.
    Source: arXiv:2404.07724, section 3 (interval); otherwise `combine_guidance`.
    """
    check_interval(interval)
    if scale == 1.0:
        return conditional
    if scale == 0.0:
        return unconditional

    def predict(z: Tensor, t: Tensor) -> Tensor:
        inside = None if interval is None else _inside(process, t, interval)
        if inside is not None and not inside.any():
            return conditional(z, t)
        pair = paired(z, t) if paired is not None else (conditional(z, t), unconditional(z, t))
        guided_output = combine_guidance(*pair, scale, rescale)
        if inside is None:
            return guided_output
        return torch.where(inside.reshape(-1, *(1,) * (z.ndim - 1)), guided_output, pair[0])

    return predict


def check_interval(interval: tuple[float, float] | None) -> None:
    """Nothing, if guidance acts somewhere.

    Raises: ConfigError otherwise.
    """
    if interval is not None and not 0.0 <= interval[0] < interval[1]:
        raise ConfigError(
            f"sampling.guidance_interval={list(interval)}: must be two rising noise levels sigma / alpha, such as "
            "[0.3, 5.0]; null guides at all of them"
        )


def _inside(process: Process, t: Tensor, interval: tuple[float, float]) -> Tensor:
    alpha, sigma = process.coefficients(t)
    ratio = sigma / alpha
    return (ratio > interval[0]) & (ratio <= interval[1])
