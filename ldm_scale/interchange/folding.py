"""Per-channel latent statistics folded into the 1x1 convolutions beside the latents, and taken out again.

Other programs know one scale for all channels. z = (z_raw - mean) / std is affine per channel, and so are quant_conv,
which makes the posterior of z_raw, and post_quant_conv, which reads it: with

    mean rows      W / std,  (b - mean) / std          log-variance rows   W,  b - 2 ln std
    post_quant     W std (per input channel),  b + W mean

the exported model's raw latents are our latents. What it costs: our bounds of the log-variance move with it, and the
way back rounds (1e-7 of the weights), which is why an export keeps the two convolutions as they were beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm_scale.engine.lazy_tensors import LazyTensors, deferred, without_values
from ldm_scale.interchange.safetensors_io import describe_difference, read_tensors, tensors_sha256
from ldm_scale.models.autoencoder import LatentStatistics

QUANT, POST_QUANT = "quant_conv", "post_quant_conv"
FOLDED = tuple(f"{conv}.{leaf}" for conv in (QUANT, POST_QUANT) for leaf in ("weight", "bias"))


def fold(state: Mapping[str, Tensor], statistics: LatentStatistics) -> Mapping[str, Tensor]:
    """A KL autoencoder's tensors whose raw latents are `state`'s latents; the same tensors where one scale is for all.

    Computed in float64, returned in the tensors' own types.
    """
    if not statistics.channel_mean:
        return state
    mean, std = _columns(statistics)
    mean_weight, logvar_weight, mean_bias, logvar_bias = _quant_halves(state)
    post_weight, post_bias = _post_quant(state)
    return _with_convolutions(
        state,
        torch.cat([mean_weight / std, logvar_weight]),
        torch.cat([(mean_bias - mean) / std, logvar_bias - 2 * std.log()]),
        post_weight * std.T,
        post_bias + post_weight @ mean,
    )


def unfold(state: Mapping[str, Tensor], statistics: LatentStatistics) -> Mapping[str, Tensor]:
    """The inverse of `fold`, to the rounding of the tensors' types."""
    if not statistics.channel_mean:
        return state
    mean, std = _columns(statistics)
    mean_weight, logvar_weight, mean_bias, logvar_bias = _quant_halves(state)
    post_weight, post_bias = _post_quant(state)
    post_weight = post_weight / std.T
    return _with_convolutions(
        state,
        torch.cat([mean_weight * std, logvar_weight]),
        torch.cat([mean_bias * std + mean, logvar_bias + 2 * std.log()]),
        post_weight,
        post_bias - post_weight @ mean,
    )


def unfold_kept(state: Mapping[str, Tensor], statistics: LatentStatistics, originals: Path) -> Mapping[str, Tensor]:
    """The weights from which `fold` made `state`: exactly, where the file `originals` has kept those that it changed.

    They are calculated where there is none, or where other software has changed `state` since.
    """
    if originals.is_file():
        kept = LazyTensors(deferred(state)) | read_tensors(originals)
        fits = not describe_difference(state, kept)
        if fits and tensors_sha256(fold(kept, statistics)) == tensors_sha256(state):
            return kept
    return unfold(state, statistics)


def _columns(statistics: LatentStatistics) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (c, 1) each."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (statistics.channel_mean, statistics.channel_std))
    return mean[:, None], std[:, None]


def _quant_halves(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quant_conv's weights (c, 2c) and biases (c, 1): those of the mean and of the log-variance."""
    weight, bias = state[f"{QUANT}.weight"].double().flatten(1), state[f"{QUANT}.bias"].double()[:, None]
    return *weight.chunk(2), *bias.chunk(2)  # type: ignore[return-value]


def _post_quant(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """post_quant_conv's weight (c, c) and bias (c, 1)."""
    return state[f"{POST_QUANT}.weight"].double().flatten(1), state[f"{POST_QUANT}.bias"].double()[:, None]


def _with_convolutions(state: Mapping[str, Tensor], *convolutions: Tensor) -> LazyTensors:
    """`state` with other values in the tensors of FOLDED, in that order."""
    kinds = without_values(state)
    return LazyTensors(deferred(state)) | {
        name: values.reshape(kinds[name].shape).to(kinds[name].dtype)
        for name, values in zip(FOLDED, convolutions, strict=True)
    }
